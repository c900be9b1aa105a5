/*
 * Two programs of two domains. The first word of the command line says which part this one plays, and for whom: the
 * others are NIC, in hexadecimal, and ENDPOINT of the peer, and its PID for a part that stops it. A part that others
 * connect to first says where it is, on a line of its own, and goes on.
 */
#include <pthread.h>
#include <signal.h>
#include <time.h>
#include <unistd.h>

#include "check.h"

enum { CONTEXT_SHIFT = 41, THREADS = 12, LONG = 256 << 20 };

static mx_endpoint_addr_t peer;
static uint64_t peer_nic;
static uint32_t peer_id;
static pid_t peer_pid;

static const uint32_t lengths[] = {0,    1,    32,    33,    128,   129,    4095,   4096,
                                   4097, 8192, 32767, 32768, 32769, 131072, 131073, 1048577};
enum { LENGTHS = sizeof lengths / sizeof *lengths };

static void fill(unsigned char *bytes, uint32_t length, uint32_t seed) {
  uint32_t at;
  for (at = 0; at < length; at++) bytes[at] = (unsigned char)(at * 31 + length + seed);
}

static void check_filled(const unsigned char *bytes, uint32_t length, uint32_t seed) {
  uint32_t at;
  for (at = 0; at < length; at++) CHECK(bytes[at] == (unsigned char)(at * 31 + length + seed));
}

/* One bit of context id, as programs have it that keep two kinds of messages apart. */
static void begin_pair(void) {
  mx_param_t param;
  param.key = MX_PARAM_CONTEXT_ID;
  param.val.context_id.bits = 1;
  param.val.context_id.shift = CONTEXT_SHIFT;
  begin(&param, 1);
}

static void say_where(void) {
  uint64_t nic;
  uint32_t id;
  OK(mx_decompose_endpoint_addr(self, &nic, &id));
  printf("%llx %u\n", (unsigned long long)nic, id);
  fflush(stdout);
}

/* As MPIs do: again, as long as the answer is that none came. */
static mx_endpoint_addr_t connect_to(uint64_t nic, uint32_t id) {
  mx_endpoint_addr_t address;
  mx_return_t code;
  do {
    code = mx_connect(endpoint, nic, id, KEY, 1000, &address);
  } while (code == MX_TIMEOUT);
  OK(code);
  return address;
}

static void connect_back(mx_endpoint_addr_t source) {
  uint64_t nic;
  uint32_t id;
  OK(mx_decompose_endpoint_addr(source, &nic, &id));
  peer = connect_to(nic, id);
}

static mx_request_t issend(void *bytes, uint32_t length, uint64_t match) {
  mx_segment_t segment = {bytes, length};
  mx_request_t request = NULL;
  OK(mx_issend(endpoint, &segment, 1, peer, match, NULL, &request));
  return request;
}

static void send_word(uint64_t match) {
  CHECK(finish(send_to(peer, NULL, 0, match)).code == MX_STATUS_SUCCESS);
}

static mx_status_t receive_word(uint64_t match) {
  mx_status_t status = finish(receive(NULL, 0, match, ALL));
  CHECK(status.code == MX_STATUS_SUCCESS);
  return status;
}

/* --- ping-pong --- */

static void bounce(uint32_t length, int first, int synchronous, uint64_t match) {
  unsigned char *bytes = malloc(length + 1);
  int turn;
  for (turn = 0; turn < 2; turn++) {
    if (turn == first) {
      mx_request_t request;
      mx_status_t status;
      memset(bytes, 0, length);
      bytes[length] = 0xa5;
      request = receive(bytes, length, match + (uint64_t)turn, ALL);
      status = finish(request);
      CHECK(status.code == MX_STATUS_SUCCESS && status.msg_length == length && status.xfer_length == length);
      check_filled(bytes, length, (uint32_t)turn);
      CHECK(bytes[length] == 0xa5);
    } else {
      mx_status_t status;
      fill(bytes, length, (uint32_t)turn);
      status = finish(synchronous ? issend(bytes, length, match + (uint64_t)turn)
                                  : send_to(peer, bytes, length, match + (uint64_t)turn));
      CHECK(status.code == MX_STATUS_SUCCESS && status.msg_length == length && status.xfer_length == length);
      CHECK(memcmp(&status.source, &peer, sizeof peer) == 0);
    }
  }
  free(bytes);
}

static void pingpong(int first) {
  int at, synchronous;
  for (synchronous = 0; synchronous < 2; synchronous++)
    for (at = 0; at < LENGTHS; at++) bounce(lengths[at], first, synchronous, (uint64_t)(at * 4 + synchronous * 2));
}

static void pong(void) {
  begin_pair();
  say_where();
  connect_back(receive_word(0x900d).source);
  send_word(0x900d);
  pingpong(1);
}

static void ping(void) {
  mx_status_t status;
  begin_pair();
  peer = connect_to(peer_nic, peer_id);
  send_word(0x900d);
  status = receive_word(0x900d);
  CHECK(memcmp(&status.source, &peer, sizeof peer) == 0);
  pingpong(0);
}

/* --- wait_any, probes, peeks, truncation, each with the peer "ask" --- */

static void answer(void) {
  static const uint32_t some[] = {0, 64, 4096, 131072};
  unsigned char *bytes = malloc(131072);
  mx_request_t all[8];
  mx_status_t status;
  int at;
  begin_pair();
  say_where();
  connect_back(receive_word(0x900d).source);
  for (at = 0; at < 8; at++) {
    fill(bytes, some[at / 2], 0);
    all[at] = send_to(peer, bytes, some[at / 2], (uint64_t)(at % 2) << CONTEXT_SHIFT | (uint64_t)at);
    CHECK(finish(all[at]).code == MX_STATUS_SUCCESS);
  }
  /* The receives of these are too short by one byte. What was sent early nobody hears of again. */
  fill(bytes, 131072, 0);
  status = finish(send_to(peer, bytes, 100, 0x7));
  CHECK(status.code == MX_STATUS_SUCCESS && status.xfer_length == 100);
  status = finish(send_to(peer, bytes, 131072, 0x8));
  CHECK(status.code == MX_STATUS_TRUNCATED && status.msg_length == 131072 && status.xfer_length == 131071);
  status = finish(issend(bytes, 50, 0x9));
  CHECK(status.code == MX_STATUS_TRUNCATED && status.xfer_length == 49);
  free(bytes);
  receive_word(0xb7e);
}

static void check_any(void) {
  uint64_t bit = (uint64_t)1 << CONTEXT_SHIFT;
  unsigned char *bytes[8];
  mx_status_t status;
  uint32_t result;
  int at;
  for (at = 0; at < 8; at++) {
    bytes[at] = malloc(131072);
    receive(bytes[at], 131072, (uint64_t)(at % 2) * bit | (uint64_t)at, ALL);
  }
  send_word(0x900d);
  /* The other context's first, though its messages come second. */
  for (at = 1; at < 8; at += 2) {
    OK(mx_wait_any(endpoint, SOON, bit, bit, &status, &result));
    CHECK(result == 1 && status.code == MX_STATUS_SUCCESS && status.match_info == (bit | (uint64_t)at));
    check_filled(bytes[at], status.msg_length, 0);
  }
  for (at = 0; at < 8; at += 2) {
    OK(mx_wait_any(endpoint, SOON, 0, bit, &status, &result));
    CHECK(result == 1 && status.match_info == (uint64_t)at);
  }
  OK(mx_test_any(endpoint, 0, bit, &status, &result));
  CHECK(result == 0);
  for (at = 0; at < 8; at++) free(bytes[at]);
}

static void check_short(uint64_t match, uint32_t length, uint32_t room) {
  unsigned char *bytes = malloc(room);
  mx_request_t request, peeked = NULL;
  mx_status_t status;
  uint32_t result;
  OK(mx_probe(endpoint, SOON, match, ALL, &status, &result));
  CHECK(result == 1 && status.msg_length == length && status.match_info == match);
  CHECK(memcmp(&status.source, &peer, sizeof peer) == 0);
  request = receive(bytes, room, match, ALL);
  OK(mx_peek(endpoint, SOON, &peeked, &result));
  CHECK(result == 1 && peeked == request);
  OK(mx_test(endpoint, &peeked, &status, &result));
  CHECK(result == 1 && status.code == MX_STATUS_TRUNCATED && status.msg_length == length && status.xfer_length == room);
  check_filled(bytes, 0, 0);
  free(bytes);
}

static void ask(void) {
  begin_pair();
  peer = connect_to(peer_nic, peer_id);
  check_any();
  check_short(0x7, 100, 99);
  check_short(0x8, 131072, 131071);
  check_short(0x9, 50, 49);
  send_word(0xb7e);
}

/* --- connects that fail, and their peer --- */

static void stay(void) {
  begin_pair();
  say_where();
  for (;;) pause();
}

static void refused(void) {
  mx_endpoint_addr_t address;
  mx_request_t request = NULL;
  begin_pair();
  CHECK(mx_connect(endpoint, peer_nic, peer_id + 1, KEY, 1000, &address) == MX_CONNECTION_FAILED);
  CHECK(mx_connect(endpoint, peer_nic, peer_id, KEY + 1, 1000, &address) == MX_BAD_CONNECTION_KEY);
  CHECK(mx_connect(endpoint, peer_nic, 200, KEY, 1000, &address) == MX_BAD_ENDPOINT_ID);
  OK(mx_iconnect(endpoint, peer_nic, peer_id + 1, KEY, 1, NULL, &request));
  CHECK(finish(request).code == MX_STATUS_ENDPOINT_CLOSED);
  OK(mx_iconnect(endpoint, peer_nic, peer_id, KEY + 1, 1, NULL, &request));
  CHECK(finish(request).code == MX_STATUS_BAD_KEY);
  OK(mx_connect(endpoint, peer_nic, peer_id, KEY, 1000, &address));
}

/* --- what programs keep with addresses, and requests that are none of the program's --- */

static void *wait_for_any(void *found) {
  mx_status_t status;
  OK(mx_wait_any(endpoint, MX_INFINITE, 0, 0, &status, found));
  return NULL;
}

static void rails(void) {
  mx_endpoint_t second;
  mx_endpoint_addr_t address, other;
  pthread_t thread;
  uint32_t found = 7;
  void *context = NULL;
  int round;
  begin(NULL, 0);
  OK(mx_open_endpoint(0, MX_ANY_ENDPOINT, KEY, NULL, 0, &second));
  OK(mx_connect(endpoint, peer_nic, peer_id, KEY, SOON, &address));
  OK(mx_connect(second, peer_nic, peer_id, KEY, SOON, &other));
  OK(mx_set_endpoint_addr_context(address, &endpoint));
  OK(mx_get_endpoint_addr_context(other, &context));
  CHECK(context == NULL);
  OK(mx_set_endpoint_addr_context(other, &second));
  CHECK(pthread_create(&thread, NULL, wait_for_any, &found) == 0);
  /* Somebody waits for any request; these are none of the program's. */
  for (round = 0; round < 200; round++) OK(mx_connect(endpoint, peer_nic, peer_id, KEY, SOON, &address));
  OK(mx_get_endpoint_addr_context(address, &context));
  CHECK(context == &endpoint);
  usleep(100000);
  OK(mx_wakeup(endpoint));
  CHECK(pthread_join(thread, NULL) == 0 && found == 0);
  OK(mx_close_endpoint(second));
  OK(mx_get_endpoint_addr_context(other, &context));
  CHECK(context == NULL);
}

/* --- more than the receiver keeps for later --- */

enum { FLOOD = 4000, DROP = 4096, KEPT = 64 << 10 };

static void held(void) {
  mx_param_t param;
  unsigned char *bytes = malloc(DROP);
  mx_status_t status;
  uint32_t result;
  int at;
  clock_t before;
  param.key = MX_PARAM_UNEXP_QUEUE_MAX;
  param.val.unexp_queue_max = KEPT;
  begin(&param, 1);
  say_where();
  OK(mx_probe(endpoint, SOON, 1, ALL, &status, &result));
  CHECK(result == 1);
  /* Long enough that all would come that can; and nobody looks for more meanwhile. */
  before = clock();
  usleep(300000);
  CHECK(clock() - before < CLOCKS_PER_SEC / 10);
  OK(mx_iprobe(endpoint, KEPT / DROP, ALL, &status, &result));
  CHECK(result == 0);
  for (at = 0; at < FLOOD; at++) {
    CHECK(finish(receive(bytes, DROP, (uint64_t)at, ALL)).code == MX_STATUS_SUCCESS);
    check_filled(bytes, DROP, (uint32_t)at);
  }
  free(bytes);
}

static void flood(void) {
  static mx_request_t all[FLOOD];
  unsigned char *bytes = malloc((size_t)FLOOD * DROP);
  int at;
  begin(NULL, 0);
  peer = connect_to(peer_nic, peer_id);
  for (at = 0; at < FLOOD; at++) {
    fill(bytes + (size_t)at * DROP, DROP, (uint32_t)at);
    all[at] = send_to(peer, bytes + (size_t)at * DROP, DROP, (uint64_t)at);
  }
  CHECK(!is_done(&all[FLOOD - 1]));
  for (at = 0; at < FLOOD; at++) CHECK(finish(all[at]).code == MX_STATUS_SUCCESS);
  free(bytes);
}

/* --- a peer that is stopped, and twelve threads that wait --- */

static int waiting;

static void *wait_in_vain(void *which) {
  mx_status_t status;
  mx_endpoint_addr_t address;
  mx_request_t request = NULL, peeked;
  uint32_t result = 7;
  char byte;
  __atomic_add_fetch(&waiting, 1, __ATOMIC_SEQ_CST);
  switch ((size_t)which % 6) {
    case 0:
      request = issend(&byte, 1, 0xabc + ((uint64_t)(size_t)which << 16));
      OK(mx_wait(endpoint, &request, MX_INFINITE, &status, &result));
      break;
    case 1:
      request = receive(&byte, 1, 0xdef, ALL);
      OK(mx_wait(endpoint, &request, MX_INFINITE, &status, &result));
      break;
    case 2:
      OK(mx_probe(endpoint, MX_INFINITE, 0xffff, ALL, &status, &result));
      break;
    case 3:
      OK(mx_peek(endpoint, MX_INFINITE, &peeked, &result));
      break;
    case 4:
      OK(mx_iconnect(endpoint, peer_nic, peer_id, KEY, 0, NULL, &request));
      OK(mx_wait(endpoint, &request, MX_INFINITE, &status, &result));
      break;
    case 5:
      CHECK(mx_connect(endpoint, peer_nic, peer_id, KEY, MX_INFINITE, &address) == MX_TIMEOUT);
      return NULL;
  }
  CHECK(result == 0);
  return NULL;
}

static void woken(void) {
  pthread_t all[THREADS];
  mx_endpoint_addr_t address;
  size_t at;
  begin_pair();
  peer = self;
  CHECK(mx_connect(endpoint, peer_nic, peer_id, KEY, 200, &address) == MX_TIMEOUT);
  for (at = 0; at < THREADS; at++) CHECK(pthread_create(&all[at], NULL, wait_in_vain, (void *)at) == 0);
  while (__atomic_load_n(&waiting, __ATOMIC_SEQ_CST) < THREADS) usleep(1000);
  /* Long enough that all of them wait: whoever comes late waits for ever. */
  usleep(500000);
  OK(mx_wakeup(endpoint));
  for (at = 0; at < THREADS; at++) CHECK(pthread_join(all[at], NULL) == 0);
}

/* --- a peer that does not answer --- */

/* The counter of sends that were done and did not arrive. */
static uint32_t lost(void) {
  uint32_t values[2];
  char labels[2][MX_MAX_STR_LEN];
  OK(mx_get_info(endpoint, MX_COUNTERS_LABELS, NULL, 0, labels, sizeof labels));
  OK(mx_get_info(endpoint, MX_COUNTERS_VALUES, NULL, 0, values, sizeof values));
  CHECK(strstr(labels[1], "lost"));
  return values[1];
}

static void impatient(void) {
  mx_request_t pending, hasty;
  begin_pair();
  peer = connect_to(peer_nic, peer_id);
  pending = issend(NULL, 0, 1);
  CHECK(kill(peer_pid, SIGSTOP) == 0);
  /* Patience is with the peer that has gone quiet: a request without any of its own ends with the one that has. */
  hasty = issend(NULL, 0, 2);
  OK(mx_set_request_timeout(endpoint, hasty, 300));
  CHECK(finish(hasty).code == MX_STATUS_ENDPOINT_UNREACHABLE);
  CHECK(finish(pending).code == MX_STATUS_ENDPOINT_UNREACHABLE);
  CHECK(kill(peer_pid, SIGCONT) == 0);
  peer = connect_to(peer_nic, peer_id);
  OK(mx_set_request_timeout(endpoint, NULL, 300));
  pending = issend(NULL, 0, 1);
  OK(mx_set_request_timeout(endpoint, pending, 0));
  hasty = send_to(peer, "not here", 8, 2);
  CHECK(finish(hasty).code == MX_STATUS_SUCCESS);
  /* Both are there, so there is nothing to lose patience with. */
  usleep(600000);
  CHECK(!is_done(&pending));
  CHECK(kill(peer_pid, SIGSTOP) == 0);
  hasty = send_to(peer, "nor here", 8, 3);
  CHECK(lost() == 0 && finish(hasty).code == MX_STATUS_SUCCESS);
  hasty = issend(NULL, 0, 4);
  CHECK(finish(hasty).code == MX_STATUS_ENDPOINT_UNREACHABLE && lost() == 1);
  CHECK(finish(pending).code == MX_STATUS_ENDPOINT_UNREACHABLE);
}

/* As patient as the environment says. */
static void patient(void) {
  begin_pair();
  peer = connect_to(peer_nic, peer_id);
  CHECK(kill(peer_pid, SIGSTOP) == 0);
  CHECK(finish(issend(NULL, 0, 1)).code == MX_STATUS_ENDPOINT_UNREACHABLE);
}

/* --- a peer that dies --- */

static void bereaved(int sends) {
  unsigned char *bytes = calloc(1, LONG);
  mx_request_t request;
  mx_status_t status;
  begin_pair();
  say_where();
  connect_back(receive_word(0x900d).source);
  request = sends ? send_to(peer, bytes, LONG, 1) : receive(bytes, LONG, 1, ALL);
  send_word(2);
  status = finish(request);
  CHECK(status.code == MX_STATUS_ENDPOINT_CLOSED && status.msg_length == LONG);
  CHECK(finish(send_to(peer, NULL, 0, 3)).code == MX_STATUS_ENDPOINT_CLOSED);
  free(bytes);
}

static void bereaved_sender(void) { bereaved(1); }
static void bereaved_receiver(void) { bereaved(0); }

/* Dies when the message has begun to move. */
static void die(int sends) {
  volatile unsigned char *bytes = calloc(1, LONG);
  int turn;
  begin_pair();
  peer = connect_to(peer_nic, peer_id);
  send_word(0x900d);
  if (sends) {
    receive_word(2);
    send_to(peer, (void *)bytes, LONG, 1);
    for (turn = 0; turn < 1000; turn++) OK(mx_progress(endpoint));
  } else {
    memset((void *)bytes, 0xee, LONG);
    receive((void *)bytes, LONG, 1, ALL);
    while (bytes[0] == 0xee) OK(mx_progress(endpoint));
  }
  kill(getpid(), SIGKILL);
}

static void dying_receiver(void) { die(0); }
static void dying_sender(void) { die(1); }

/* --- somebody that is no C program, see the test: it sends, and gets everything back, one byte more --- */

static void echo(void) {
  unsigned char *bytes = malloc(1 << 20);
  mx_status_t status;
  begin(NULL, 0);
  say_where();
  connect_back(receive_word(0x900d).source);
  do {
    status = finish(receive(bytes, (1 << 20) - 1, 0x100, 0x100));
    CHECK(status.code == MX_STATUS_SUCCESS);
    bytes[status.xfer_length] = 0x5a;
    CHECK(finish(send_to(peer, bytes, status.xfer_length + 1, status.match_info)).code == MX_STATUS_SUCCESS);
  } while (status.xfer_length > 0);
  free(bytes);
}

/* --- the handler, of what other programs send --- */

struct seen {
  int count;
  uint64_t match[8];
  int is_there[8];
};

static struct seen seen;

static mx_unexp_handler_action_t note(void *context, mx_endpoint_addr_t source, uint64_t match, uint32_t length,
                                      void *data) {
  struct seen *into = context;
  (void)source;
  CHECK(into->count < 8);
  into->match[into->count] = match;
  into->is_there[into->count++] = data != NULL;
  if (data != NULL) check_filled(data, length, 0);
  return match % 2 ? MX_RECV_FINISHED : MX_RECV_CONTINUE;
}

/* Of these lengths, each to be kept, and to be done with. */
static const uint32_t noted[] = {10, 4096, 65536};

static void watched(void) {
  unsigned char *bytes = malloc(65536);
  mx_status_t status;
  int at;
  begin_pair();
  say_where();
  connect_back(receive_word(0x900d).source);
  OK(mx_register_unexp_handler(endpoint, note, &seen));
  send_word(0x900d);
  receive_word(0xb7e);
  CHECK(seen.count == 6);
  for (at = 0; at < 6; at++) {
    CHECK(seen.match[at] == (uint64_t)at && seen.is_there[at] == (noted[at / 2] <= 32768));
  }
  for (at = 0; at < 6; at += 2) {
    status = finish(receive(bytes, 65536, (uint64_t)at, ALL));
    CHECK(status.code == MX_STATUS_SUCCESS && status.xfer_length == noted[at / 2]);
    check_filled(bytes, status.xfer_length, 0);
  }
  CHECK(seen.count == 6);
  free(bytes);
}

static void watcher(void) {
  mx_request_t all[6];
  mx_status_t status;
  int at;
  begin_pair();
  peer = connect_to(peer_nic, peer_id);
  send_word(0x900d);
  receive_word(0x900d);
  for (at = 0; at < 6; at++) {
    unsigned char *message = malloc(65536);
    fill(message, noted[at / 2], 0);
    all[at] = send_to(peer, message, noted[at / 2], (uint64_t)at);
  }
  send_word(0xb7e);
  for (at = 0; at < 6; at++) {
    status = finish(all[at]);
    CHECK(status.code == (at == 5 ? MX_STATUS_TRUNCATED : MX_STATUS_SUCCESS));
    CHECK(status.xfer_length == (at == 5 ? 0 : noted[at / 2]));
  }
}

/* As message passing libraries do: the handler posts the receive, and connects to whom it does not know. */

static unsigned char *posted[3];

static mx_unexp_handler_action_t post(void *context, mx_endpoint_addr_t source, uint64_t match, uint32_t length,
                                      void *data) {
  mx_request_t request;
  mx_status_t status;
  uint64_t nic;
  uint32_t id, result = 7;
  (void)data;
  OK(mx_decompose_endpoint_addr(source, &nic, &id));
  posted[match] = malloc(length);
  request = receive(posted[match], length, match, ALL);
  OK(mx_iconnect(endpoint, nic, id, KEY, 0x100 | match, context, &request));
  OK(mx_wait(endpoint, &request, MX_INFINITE, &status, &result));
  CHECK(result == 0);
  return MX_RECV_CONTINUE;
}

static void poster(void) {
  mx_status_t status;
  uint32_t result;
  int at;
  begin_pair();
  OK(mx_register_unexp_handler(endpoint, post, NULL));
  say_where();
  for (at = 0; at < 6; at++) {
    OK(mx_wait_any(endpoint, SOON, 0, 0, &status, &result));
    CHECK(result == 1 && status.code == MX_STATUS_SUCCESS);
    if (status.match_info & 0x100)
      peer = status.source;
    else
      check_filled(posted[status.match_info], noted[status.match_info], 0);
  }
  send_word(0x900d);
}

static void mailer(void) {
  unsigned char *bytes[3];
  mx_request_t all[3];
  int at;
  begin_pair();
  peer = connect_to(peer_nic, peer_id);
  for (at = 0; at < 3; at++) {
    bytes[at] = malloc(noted[at]);
    fill(bytes[at], noted[at], 0);
    all[at] = send_to(peer, bytes[at], noted[at], (uint64_t)at);
  }
  receive_word(0x900d);
  for (at = 0; at < 3; at++) CHECK(finish(all[at]).xfer_length == noted[at]);
}

static const struct test parts[] = {
    {"pong", pong},         {"ping", ping},
    {"answer", answer},     {"ask", ask},
    {"stay", stay},         {"refused", refused},
    {"woken", woken},       {"bereaved_sender", bereaved_sender},
    {"dying_receiver", dying_receiver}, {"bereaved_receiver", bereaved_receiver},
    {"dying_sender", dying_sender},     {"echo", echo},
    {"watched", watched},   {"watcher", watcher},
    {"poster", poster},     {"mailer", mailer},
    {"held", held},         {"flood", flood},
    {"rails", rails},       {"impatient", impatient},
    {"patient", patient},
};

int main(int argc, char **argv) {
  if (argc > 3) {
    peer_nic = strtoull(argv[2], NULL, 16);
    peer_id = (uint32_t)strtoul(argv[3], NULL, 10);
  }
  if (argc > 4) peer_pid = (pid_t)strtol(argv[4], NULL, 10);
  return run(parts, sizeof parts / sizeof *parts, argc, argv);
}
