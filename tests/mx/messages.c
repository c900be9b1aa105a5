/* Messages that a program sends to its own endpoint. One test for each name; see run() in check.h. */
#include <pthread.h>
#include <unistd.h>

#include "check.h"

static unsigned char *pattern(size_t length) {
  unsigned char *bytes = malloc(length + 1);
  size_t at;
  for (at = 0; at < length; at++) bytes[at] = (unsigned char)(at * 31 + length);
  return bytes;
}

/* On either side of every limit between the ways in which messages of some length are sent. */
static void lengths(void) {
  static const uint32_t all[] = {0,    1,    32,    33,    128,   129,    4095,   4096,
                                 4097, 8192, 32767, 32768, 32769, 131072, 131073, 1048577};
  size_t at;
  int posted_first;
  begin(NULL, 0);
  for (at = 0; at < sizeof all / sizeof *all; at++) {
    for (posted_first = 0; posted_first < 2; posted_first++) {
      uint32_t length = all[at];
      unsigned char *sent = pattern(length), *received = calloc(1, length + 1);
      mx_request_t to = NULL, from;
      mx_status_t status;
      received[length] = 0xa5;
      if (posted_first) to = receive(received, length, at, ALL);
      from = send(sent, length, at);
      if (!posted_first) to = receive(received, length, at, ALL);
      status = finish(to);
      CHECK(status.code == MX_STATUS_SUCCESS && status.msg_length == length && status.xfer_length == length);
      CHECK(memcmp(sent, received, length) == 0 && received[length] == 0xa5);
      status = finish(from);
      CHECK(status.code == MX_STATUS_SUCCESS && status.msg_length == length && status.xfer_length == length);
      free(sent);
      free(received);
    }
  }
}

static void segments(void) {
  char one[] = "abc", two[] = "defgh", first[2], second[5] = "....", third[9] = "........";
  mx_segment_t from[] = {{one, 3}, {NULL, 0}, {two, 0}, {two, 5}};
  mx_segment_t to[] = {{NULL, 0}, {first, 2}, {second, 3}, {third, 0}, {third, 8}};
  mx_segment_t many[MX_MAX_SEGMENTS + 1], nowhere = {NULL, 4}, half = {one, 0x80000000U}, halves[2];
  mx_request_t send = NULL, receive = NULL;
  mx_status_t status;
  begin(NULL, 0);
  OK(mx_isend(endpoint, from, 4, self, 1, NULL, &send));
  OK(mx_irecv(endpoint, to, 5, 1, ALL, NULL, &receive));
  status = finish(receive);
  CHECK(status.msg_length == 8 && status.xfer_length == 8 && memcmp(first, "ab", 2) == 0);
  CHECK(strcmp(second, "cde.") == 0 && strcmp(third, "fgh.....") == 0);
  CHECK(finish(send).xfer_length == 8);
  OK(mx_issend(endpoint, NULL, 0, self, 2, NULL, &send));
  OK(mx_irecv(endpoint, NULL, 0, 2, ALL, NULL, &receive));
  CHECK(finish(receive).msg_length == 0 && finish(send).code == MX_STATUS_SUCCESS);
  memset(many, 0, sizeof many);
  halves[0] = halves[1] = half;
  CHECK(mx_isend(endpoint, many, MX_MAX_SEGMENTS + 1, self, 3, NULL, &send) == MX_BAD_SEG_CNT);
  CHECK(mx_isend(endpoint, NULL, 1, self, 3, NULL, &send) == MX_BAD_SEG_LIST);
  CHECK(mx_irecv(endpoint, &nowhere, 1, 3, ALL, NULL, &receive) == MX_BAD_SEG_MEM);
  CHECK(mx_isend(endpoint, halves, 2, self, 3, NULL, &send) == MX_BAD_SEG_LIST);
  OK(mx_isend(endpoint, many, MX_MAX_SEGMENTS, self, 3, NULL, &send));
}

static void truncation(void) {
  char sent[] = "too long", received[5] = "....";
  mx_request_t from, to;
  mx_status_t status;
  begin(NULL, 0);
  from = send(sent, 8, 1);
  to = receive(received, 3, 1, ALL);
  status = finish(to);
  CHECK(status.code == MX_STATUS_TRUNCATED && status.msg_length == 8 && status.xfer_length == 3);
  CHECK(strcmp(received, "too.") == 0);
  status = finish(from);
  CHECK(status.code == MX_STATUS_TRUNCATED && status.msg_length == 8 && status.xfer_length == 3);
}

static void order(void) {
  char received[4];
  mx_request_t first, second, sends[3];
  mx_status_t status;
  uint32_t result;
  begin(NULL, 0);
  /* Two receives take the same message: the one posted first gets it, though it asks for less. */
  first = receive(&received[0], 1, 0, 0);
  second = receive(&received[1], 1, 7, ALL);
  sends[0] = send("x", 1, 7);
  CHECK(is_done(&first) && !is_done(&second) && received[0] == 'x');
  /* Two messages fit a receive: the one that came first is taken. */
  sends[1] = send("y", 1, 8);
  sends[2] = send("z", 1, 9);
  OK(mx_iprobe(endpoint, 8, 8, &status, &result));
  CHECK(result == 1 && status.match_info == 8);
  CHECK(finish(receive(&received[2], 1, 8, 8)).match_info == 8 && received[2] == 'y');
  CHECK(is_done(&sends[0]) && is_done(&sends[1]) && !is_done(&sends[2]));
}

static void probes(void) {
  mx_status_t status;
  uint32_t result = 7;
  char received[9];
  int round;
  begin(NULL, 0);
  OK(mx_iprobe(endpoint, 0, 0, &status, &result));
  CHECK(result == 0);
  OK(mx_probe(endpoint, 20, 0, 0, &status, &result));
  CHECK(result == 0);
  CHECK(mx_iprobe(endpoint, 2, 1, &status, &result) == MX_BAD_MATCH_MASK);
  send("a message", 9, 0x77);
  for (round = 0; round < 2; round++) {
    memset(&status, 0xee, sizeof status);
    OK(mx_probe(endpoint, MX_INFINITE, 0x70, 0xf0, &status, &result));
    CHECK(result == 1 && status.code == MX_STATUS_SUCCESS && status.match_info == 0x77);
    CHECK(status.msg_length == 9 && status.xfer_length == 9 && !memcmp(&status.source, &self, sizeof self));
  }
  finish(receive(received, 9, 0x77, ALL));
  OK(mx_iprobe(endpoint, 0x77, ALL, &status, &result));
  CHECK(result == 0);
}

static void timeouts(void) {
  mx_status_t status, before;
  uint32_t result = 7;
  char byte;
  mx_request_t request, kept, peeked;
  begin(NULL, 0);
  kept = request = receive(&byte, 1, 1, ALL);
  memset(&status, 0xee, sizeof status);
  before = status;
  OK(mx_wait(endpoint, &request, 20, &status, &result));
  CHECK(result == 0 && request == kept && memcmp(&before, &status, sizeof status) == 0);
  result = 7;
  OK(mx_wait_any(endpoint, 20, 0, 0, &status, &result));
  CHECK(result == 0);
  result = 7;
  OK(mx_peek(endpoint, 20, &peeked, &result));
  CHECK(result == 0);
}

static void peeks(void) {
  char bytes[2];
  mx_request_t first, second, peeked = NULL, again = NULL;
  mx_request_t sends[2];
  uint32_t result;
  mx_status_t status;
  begin(NULL, 0);
  OK(mx_ipeek(endpoint, &peeked, &result));
  CHECK(result == 0);
  first = receive(&bytes[0], 1, 1, ALL);
  second = receive(&bytes[1], 1, 2, ALL);
  /* In the order in which they are done, not in that in which they were posted. */
  sends[1] = send("b", 1, 2);
  sends[0] = send("a", 1, 1);
  OK(mx_forget(endpoint, &sends[0]));
  OK(mx_forget(endpoint, &sends[1]));
  CHECK(sends[0] == NULL && sends[1] == NULL);
  OK(mx_ipeek(endpoint, &peeked, &result));
  OK(mx_peek(endpoint, SOON, &again, &result));
  CHECK(result == 1 && peeked == second && again == second);
  OK(mx_test(endpoint, &peeked, &status, &result));
  CHECK(result == 1 && peeked == NULL && status.match_info == 2);
  OK(mx_ipeek(endpoint, &peeked, &result));
  CHECK(result == 1 && peeked == first && is_done(&peeked));
  OK(mx_ipeek(endpoint, &peeked, &result));
  CHECK(result == 0);
}

static void contexts(void) {
  mx_param_t param;
  mx_status_t status;
  mx_request_t request;
  mx_segment_t nothing = {NULL, 0};
  uint64_t mask = (uint64_t)1 << 41, sender;
  uint32_t result;
  void *context = NULL;
  param.key = MX_PARAM_CONTEXT_ID;
  param.val.context_id.bits = 1;
  param.val.context_id.shift = 41;
  begin(&param, 1);
  CHECK(mx_irecv(endpoint, &nothing, 1, 5, ~mask, NULL, &request) == MX_BAD_MATCHING_FOR_CONTEXT_ID_MASK);
  CHECK(mx_irecv(endpoint, &nothing, 1, 6, mask, NULL, &request) == MX_BAD_MATCH_MASK);
  for (sender = 0; sender < 2; sender++) {
    OK(mx_isend(endpoint, NULL, 0, self, sender << 41 | 5, NULL, &request));
    OK(mx_forget(endpoint, &request));
  }
  OK(mx_irecv(endpoint, &nothing, 1, 0, mask, (void *)0x10, &request));
  OK(mx_context(&request, &context));
  CHECK(context == (void *)0x10);
  OK(mx_irecv(endpoint, &nothing, 1, mask, mask, (void *)0x11, &request));
  OK(mx_wait_any(endpoint, SOON, mask, mask, &status, &result));
  CHECK(result == 1 && status.context == (void *)0x11 && status.match_info == (mask | 5));
  OK(mx_wait_any(endpoint, 20, mask, mask, &status, &result));
  CHECK(result == 0);
  /* A mask that spans contexts. */
  OK(mx_test_any(endpoint, 5, 0xff, &status, &result));
  CHECK(result == 1 && status.context == (void *)0x10 && status.match_info == 5);
  CHECK(mx_wait_any(endpoint, 20, 2, 1, &status, &result) == MX_BAD_MATCH_MASK);
}

static void progression(void) {
  char byte = 0;
  mx_request_t request;
  begin(NULL, 0);
  request = receive(&byte, 1, 1, ALL);
  OK(mx_disable_progression(endpoint));
  OK(mx_disable_progression(endpoint));
  send("x", 1, 1);
  OK(mx_progress(endpoint));
  CHECK(!is_done(&request) && byte == 0);
  OK(mx_reenable_progression(endpoint));
  OK(mx_reenable_progression(endpoint));
  CHECK(is_done(&request) && byte == 'x');
}

static void buffered(void) {
  char sent[] = "before", received[8] = "";
  mx_request_t from, to;
  uint32_t result = 7;
  begin(NULL, 0);
  from = send(sent, 7, 1);
  /* The memory is the program's again, and the message what it was. */
  OK(mx_ibuffered(endpoint, &from, &result));
  CHECK(result == 1 && !is_done(&from));
  memcpy(sent, "after!", 7);
  to = receive(received, 8, 1, ALL);
  CHECK(strcmp(received, "before") == 0);
  OK(mx_buffered(endpoint, &from, MX_INFINITE, &result));
  CHECK(result == 1 && is_done(&from) && is_done(&to));
  to = receive(received, 8, 2, ALL);
  CHECK(mx_ibuffered(endpoint, &to, &result) == MX_BAD_REQUEST);
}

static int returned;

static void *wait_for_ever(void *request) {
  mx_status_t status;
  mx_request_t peeked = request;
  uint32_t result = 7, *found = malloc(sizeof *found);
  if (request != NULL)
    OK(mx_wait(endpoint, &peeked, MX_INFINITE, &status, &result));
  else
    OK(mx_peek(endpoint, MX_INFINITE, &peeked, &result));
  *found = result;
  __atomic_add_fetch(&returned, 1, __ATOMIC_SEQ_CST);
  return found;
}

static void threads(void) {
  pthread_t waiting[2];
  mx_request_t request;
  char byte = 0;
  void *found;
  int at;
  begin(NULL, 0);
  request = receive(&byte, 1, 1, ALL);
  CHECK(pthread_create(&waiting[0], NULL, wait_for_ever, request) == 0);
  CHECK(pthread_create(&waiting[1], NULL, wait_for_ever, NULL) == 0);
  /* Long enough that both wait; one that comes late would wait for ever. */
  usleep(300000);
  CHECK(__atomic_load_n(&returned, __ATOMIC_SEQ_CST) == 0);
  OK(mx_wakeup(endpoint));
  for (at = 0; at < 2; at++) {
    CHECK(pthread_join(waiting[at], &found) == 0 && *(uint32_t *)found == 0);
    free(found);
  }
  CHECK(pthread_create(&waiting[0], NULL, wait_for_ever, request) == 0);
  usleep(20000);
  CHECK(__atomic_load_n(&returned, __ATOMIC_SEQ_CST) == 2);
  send("x", 1, 1);
  CHECK(pthread_join(waiting[0], &found) == 0 && *(uint32_t *)found == 1 && byte == 'x');
  free(found);
}

enum { SENDERS = 4, ROUNDS = 500 };

static void *talk_to_itself(void *which) {
  uint64_t match = (uint64_t)(size_t)which << 32;
  int round;
  for (round = 0; round < ROUNDS; round++) {
    uint64_t sent = match | (uint64_t)round, received = 0;
    mx_request_t request = receive(&received, sizeof received, sent, ALL);
    mx_request_t outgoing = send(&sent, sizeof sent, sent);
    CHECK(finish(request).match_info == sent && received == sent);
    OK(mx_forget(endpoint, &outgoing));
  }
  return NULL;
}

static void crowd(void) {
  pthread_t all[SENDERS];
  size_t at;
  uint32_t result;
  mx_request_t peeked;
  begin(NULL, 0);
  for (at = 0; at < SENDERS; at++) CHECK(pthread_create(&all[at], NULL, talk_to_itself, (void *)at) == 0);
  for (at = 0; at < SENDERS; at++) CHECK(pthread_join(all[at], NULL) == 0);
  OK(mx_ipeek(endpoint, &peeked, &result));
  CHECK(result == 0);
}

static const struct test tests[] = {
    {"lengths", lengths},   {"segments", segments}, {"truncation", truncation}, {"order", order},
    {"probes", probes},     {"timeouts", timeouts}, {"peeks", peeks},           {"contexts", contexts},
    {"threads", threads},   {"crowd", crowd},       {"progression", progression},
    {"buffered", buffered},
};

int main(int argc, char **argv) {
  return run(tests, sizeof tests / sizeof *tests, argc, argv);
}
