/* The handler of messages that nobody waits for. One test for each name; see run() in check.h. */
#include "check.h"

struct seen {
  int count;
  mx_unexp_handler_action_t action;
  uint64_t matches[8];
  uint32_t length;
  char data[64];
  mx_request_t posted;
  char received[64];
};

static struct seen seen;

static mx_unexp_handler_action_t note(void *context, mx_endpoint_addr_t source, uint64_t match_info, uint32_t length,
                                      void *data) {
  struct seen *into = context;
  CHECK(memcmp(&source, &self, sizeof self) == 0);
  CHECK(data != NULL && length < sizeof into->data);
  into->matches[into->count++] = match_info;
  into->length = length;
  memcpy(into->data, data, length);
  return into->action;
}

static void finished(void) {
  mx_request_t request;
  mx_status_t status;
  uint32_t result;
  char received[8];
  begin(NULL, 0);
  seen.action = MX_RECV_FINISHED;
  OK(mx_register_unexp_handler(endpoint, note, &seen));
  status = finish(send("dealt with", 10, 4));
  CHECK(status.code == MX_STATUS_SUCCESS && status.xfer_length == 10);
  CHECK(seen.count == 1 && seen.matches[0] == 4 && seen.length == 10 && !memcmp(seen.data, "dealt with", 10));
  OK(mx_iprobe(endpoint, 0, 0, &status, &result));
  CHECK(result == 0);
  /* What a receive waits for is none of its business. */
  request = receive(received, 8, 5, ALL);
  send("expected", 8, 5);
  CHECK(is_done(&request) && seen.count == 1);
  OK(mx_register_unexp_handler(endpoint, NULL, NULL));
  send("", 0, 6);
  OK(mx_iprobe(endpoint, 6, ALL, &status, &result));
  CHECK(result == 1 && seen.count == 1);
}

static void continued(void) {
  char received[8] = "";
  mx_request_t request;
  mx_status_t status;
  uint32_t result;
  begin(NULL, 0);
  seen.action = MX_RECV_CONTINUE;
  OK(mx_register_unexp_handler(endpoint, note, &seen));
  request = send("kept", 5, 4);
  OK(mx_iprobe(endpoint, 4, ALL, &status, &result));
  CHECK(result == 1 && seen.count == 1 && !is_done(&request));
  CHECK(finish(receive(received, 8, 4, ALL)).xfer_length == 5 && strcmp(received, "kept") == 0);
  CHECK(is_done(&request) && seen.count == 1);
}

/* As message passing libraries do: post the receive, and something more, while the message waits. */
static mx_unexp_handler_action_t post(void *context, mx_endpoint_addr_t source, uint64_t match_info, uint32_t length,
                                      void *data) {
  struct seen *into = context;
  mx_request_t more = NULL;
  uint32_t result = 7;
  mx_status_t status;
  (void)data;
  into->matches[into->count++] = match_info;
  if (into->count > 1) return MX_RECV_CONTINUE;
  into->posted = receive(into->received, length, match_info, ALL);
  OK(mx_iconnect(endpoint, 0, 0, KEY, 0, NULL, &more) == MX_NIC_NOT_FOUND ? MX_SUCCESS : MX_FAILURE);
  /* It fits the receive, and yet it comes second. */
  send_to(source, "overtake", 8, 1);
  more = send_to(source, "more", 4, 2);
  /* Nothing moves meanwhile; and what would wait for that does not. */
  CHECK(!is_done(&more));
  OK(mx_wait(endpoint, &more, MX_INFINITE, &status, &result));
  CHECK(result == 0 && mx_close_endpoint(endpoint) == MX_CLOSE_IN_HANDLER);
  OK(mx_disable_progression(endpoint));
  OK(mx_reenable_progression(endpoint));
  return MX_RECV_CONTINUE;
}

static void posting(void) {
  mx_request_t request;
  mx_status_t status;
  uint32_t result;
  begin(NULL, 0);
  OK(mx_register_unexp_handler(endpoint, post, &seen));
  request = send("meet me", 8, 1);
  CHECK(is_done(&request) && is_done(&seen.posted) && strcmp(seen.received, "meet me") == 0);
  CHECK(seen.count == 3 && seen.matches[0] == 1 && seen.matches[1] == 1 && seen.matches[2] == 2);
  OK(mx_iprobe(endpoint, 2, ALL, &status, &result));
  CHECK(result == 1 && status.msg_length == 4);
}

static void note_callback(void *context, uint64_t match_info, int length) {
  struct seen *into = context;
  into->matches[into->count++] = match_info;
  into->length = (uint32_t)length;
}

static void callback(void) {
  mx_status_t status;
  uint32_t result;
  begin(NULL, 0);
  OK(mx_register_unexp_callback(endpoint, note_callback, &seen));
  send("told", 4, 9);
  CHECK(seen.count == 1 && seen.matches[0] == 9 && seen.length == 4);
  OK(mx_iprobe(endpoint, 9, ALL, &status, &result));
  CHECK(result == 1);
}

static const struct test tests[] = {
    {"finished", finished}, {"continued", continued}, {"posting", posting}, {"callback", callback}};

int main(int argc, char **argv) {
  return run(tests, sizeof tests / sizeof *tests, argc, argv);
}
