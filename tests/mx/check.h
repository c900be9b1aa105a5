/* What the programs beside this share: an endpoint of one's own, and checks that say where they failed. */
#ifndef CHECK_H
#define CHECK_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "myriexpress.h"

#define CHECK(fact)                                              \
  do {                                                           \
    if (!(fact)) {                                               \
      fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #fact); \
      exit(1);                                                   \
    }                                                            \
  } while (0)

#define OK(call) CHECK((call) == MX_SUCCESS)

#define KEY 0x12345
#define ALL MX_MATCH_MASK_NONE
/* Milliseconds: no test waits longer for what must happen. */
#define SOON 10000

struct test {
  const char *name;
  void (*run)(void);
};

static mx_endpoint_t endpoint;
static mx_endpoint_addr_t self;

static inline void begin(mx_param_t *params, uint32_t count) {
  mx_set_error_handler(MX_ERRORS_RETURN);
  OK(mx_init());
  OK(mx_open_endpoint(MX_ANY_NIC, MX_ANY_ENDPOINT, KEY, params, count, &endpoint));
  OK(mx_get_endpoint_addr(endpoint, &self));
}

static inline mx_request_t send_to(mx_endpoint_addr_t to, void *bytes, uint32_t length, uint64_t match) {
  mx_segment_t segment = {bytes, length};
  mx_request_t request = NULL;
  OK(mx_isend(endpoint, &segment, 1, to, match, NULL, &request));
  CHECK(request != NULL);
  return request;
}

static inline mx_request_t send(void *bytes, uint32_t length, uint64_t match) {
  return send_to(self, bytes, length, match);
}

static inline mx_request_t receive(void *bytes, uint32_t length, uint64_t match, uint64_t mask) {
  mx_segment_t segment = {bytes, length};
  mx_request_t request = NULL;
  OK(mx_irecv(endpoint, &segment, 1, match, mask, NULL, &request));
  CHECK(request != NULL);
  return request;
}

static inline mx_status_t finish(mx_request_t request) {
  mx_status_t status;
  uint32_t result = 0;
  OK(mx_wait(endpoint, &request, SOON, &status, &result));
  CHECK(result == 1 && request == NULL);
  return status;
}

static inline int is_done(mx_request_t *request) {
  mx_status_t status;
  uint32_t result = 7;
  OK(mx_test(endpoint, request, &status, &result));
  CHECK(result == 0 || result == 1);
  return (int)result;
}

/* Run the test that the command line names. */
static inline int run(const struct test *tests, size_t count, int argc, char **argv) {
  size_t at;
  for (at = 0; at < count; at++) {
    if (argc > 1 && strcmp(argv[1], tests[at].name) == 0) {
      tests[at].run();
      puts("ok");
      return 0;
    }
    if (argc == 1) puts(tests[at].name);
  }
  return argc > 1;
}

#endif
