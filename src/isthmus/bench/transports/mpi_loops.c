/* The ping-pong and the stream between two ranks, as crates/bench has them: byte 0 of a message is its mark.
 *
 * mpi_loops LOAD SIZE WARMUP DURATION AHEAD [CPU CPU]: LOAD is pingpong or stream; seconds; so many messages of a
 * stream are under way at a time, 0: blocking calls. Rank 0, the client, prints one JSON object. */
#define _GNU_SOURCE
#include <mpi.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { WARM = 1, COUNTED = 2, LAST = 3 };
enum { TAG = 7, AHEAD_MAX = 1024, BURST_BYTES = 32 * 1024, BURST_MAX = 64 };

struct found {
    double p50_us, p99_us, seconds, cpu_s;
    double count, bytes, total_bytes;
};

static int rank;
static size_t size, ahead;
static unsigned char *message;
/* Of what is under way: the oldest is at `at`. */
static MPI_Request requests[AHEAD_MAX];
static unsigned char *places;
static size_t at, under_way;

static double cpu_s(void)
{
    struct timespec time;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
    return (double)time.tv_sec + (double)time.tv_nsec * 1e-9;
}

static unsigned char *place(size_t number)
{
    return places + number % ahead * size;
}

static MPI_Request *request(size_t number)
{
    return &requests[number % ahead];
}

static void send(unsigned char mark)
{
    message[0] = mark;
    if (ahead == 0) {
        MPI_Send(message, (int)size, MPI_BYTE, 1 - rank, TAG, MPI_COMM_WORLD);
        return;
    }
    if (under_way == ahead) {
        MPI_Wait(request(at++), MPI_STATUS_IGNORE);
        under_way--;
    }
    size_t next = at + under_way++;
    memcpy(place(next), message, size);
    MPI_Isend(place(next), (int)size, MPI_BYTE, 1 - rank, TAG, MPI_COMM_WORLD, request(next));
    while (mark == LAST && under_way > 0) {
        MPI_Wait(request(at++), MPI_STATUS_IGNORE);
        under_way--;
    }
}

static void post(size_t number)
{
    MPI_Irecv(place(number), (int)size, MPI_BYTE, 1 - rank, TAG, MPI_COMM_WORLD, request(number));
}

static unsigned char receive(void)
{
    if (ahead == 0) {
        MPI_Recv(message, (int)size, MPI_BYTE, 1 - rank, TAG, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
        return message[0];
    }
    for (; under_way < ahead; under_way++) post(at + under_way);
    MPI_Wait(request(at), MPI_STATUS_IGNORE);
    memcpy(message, place(at), size);
    post(at++ + under_way);
    while (message[0] == LAST && under_way > 0) {
        /* What nothing will meet. */
        MPI_Cancel(request(at));
        MPI_Wait(request(at++), MPI_STATUS_IGNORE);
        under_way--;
    }
    return message[0];
}

static int by_size(const void *one, const void *other)
{
    double difference = *(const double *)one - *(const double *)other;
    return (difference > 0) - (difference < 0);
}

static struct found ping(double warmup, double duration)
{
    struct found found = {0};
    size_t count = 0, room = 1 << 16;
    double *times = malloc(room * sizeof *times);
    double until = MPI_Wtime() + warmup;
    do {
        send(WARM);
        receive();
    } while (MPI_Wtime() < until);
    double cpu = cpu_s(), started = MPI_Wtime(), before = started;
    do {
        send(COUNTED);
        receive();
        double now = MPI_Wtime();
        if (count == room && !(times = realloc(times, (room *= 2) * sizeof *times))) abort();
        times[count++] = now - before;
        before = now;
    } while (before < started + duration);
    found.cpu_s = cpu_s() - cpu;
    send(LAST);
    receive();
    qsort(times, count, sizeof *times, by_size);
    found.p50_us = times[count / 2] * 1e6 / 2;
    found.p99_us = times[(size_t)((double)count * 0.99)] * 1e6 / 2;
    found.count = (double)count;
    found.seconds = before - started;
    free(times);
    return found;
}

static struct found pong(void)
{
    struct found found = {0};
    double cpu = 0;
    unsigned char mark;
    do {
        mark = receive();
        if (cpu == 0) cpu = cpu_s();
        send(mark);
    } while (mark != LAST);
    found.cpu_s = cpu_s() - cpu;
    return found;
}

static struct found stream(double warmup, double duration)
{
    struct found found = {0};
    double phases[] = {warmup, duration}, cpu = cpu_s();
    size_t burst = BURST_BYTES / size;
    burst = burst < 1 ? 1 : burst > BURST_MAX ? BURST_MAX : burst;
    for (int phase = 0; phase < 2; phase++) {
        double until = MPI_Wtime() + phases[phase];
        do {
            for (size_t number = 0; number < burst; number++) send(phase ? COUNTED : WARM);
        } while (MPI_Wtime() < until);
    }
    send(LAST);
    found.cpu_s = cpu_s() - cpu;
    return found;
}

static struct found drain(void)
{
    struct found found = {0};
    double warm = 0;
    unsigned char mark = receive();
    double cpu = cpu_s();
    for (; mark == WARM; warm++) mark = receive();
    /* The first counted message starts the clock and is not counted itself. */
    double started = MPI_Wtime();
    do {
        mark = receive();
        found.count++;
    } while (mark != LAST);
    found.seconds = MPI_Wtime() - started;
    found.cpu_s = cpu_s() - cpu;
    found.bytes = found.count * (double)size;
    found.total_bytes = (warm + found.count) * (double)size;
    return found;
}

int main(int argc, char **argv)
{
    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    if (argc < 6) return 2;
    int is_ping = !strcmp(argv[1], "pingpong");
    size = strtoull(argv[2], NULL, 10);
    ahead = strtoull(argv[5], NULL, 10);
    if (size == 0 || ahead > AHEAD_MAX) return 2;
    if (argc >= 8) {
        cpu_set_t set;
        CPU_ZERO(&set);
        CPU_SET(atoi(argv[6 + rank]), &set);
        sched_setaffinity(0, sizeof set, &set);
    }
    message = malloc(size);
    places = malloc(size * (ahead + 1));
    if (!message || !places) return 2;
    for (size_t offset = 0; offset < size; offset++) message[offset] = (unsigned char)(offset % 251);
    MPI_Barrier(MPI_COMM_WORLD);
    double warmup = atof(argv[3]), duration = atof(argv[4]);
    struct found both[2], found;
    if (rank == 0) found = is_ping ? ping(warmup, duration) : stream(warmup, duration);
    else found = is_ping ? pong() : drain();
    for (size_t offset = 1; offset < size; offset++)
        if (message[offset] != offset % 251) {
            fprintf(stderr, "byte %zu of the last message is %d\n", offset, message[offset]);
            MPI_Abort(MPI_COMM_WORLD, 3);
        }
    MPI_Gather(&found, sizeof found, MPI_BYTE, both, sizeof found, MPI_BYTE, 0, MPI_COMM_WORLD);
    if (rank == 0) {
        char library[MPI_MAX_LIBRARY_VERSION_STRING];
        int length;
        MPI_Get_library_version(library, &length);
        library[strcspn(library, "\n\"\\")] = 0;
        struct found *of = &both[is_ping ? 0 : 1];
        printf("{\"library\": \"%s\", \"report\": {", library);
        if (is_ping) printf("\"p50_us\": %.9g, \"p99_us\": %.9g, ", of->p50_us, of->p99_us);
        printf("\"count\": %.0f, \"bytes\": %.0f, \"total_bytes\": %.0f, \"seconds\": %.9g, \"cpu_s\": %.9g}}\n",
               of->count, of->bytes, of->total_bytes, of->seconds, both[0].cpu_s + both[1].cpu_s);
    }
    MPI_Finalize();
    return 0;
}
