/*
 * A program that was compiled elsewhere: it knows the interface by its numbers, and our headers not at all.
 * It sends itself a message, and says "ok".
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
  uint64_t words[2];
} address_t;

typedef struct {
  void *start;
  uint32_t length;
} piece_t;

/* 48 bytes; what is where is said by offsets. */
typedef struct {
  uint64_t words[6];
} outcome_t;

typedef int (*handler_t)(char *, int);

extern handler_t const MX_ERRORS_RETURN;
extern handler_t const MX_ERRORS_ARE_FATAL;
extern int mx__init_api(int);
extern handler_t mx_set_error_handler(handler_t);
extern int mx_open_endpoint(uint32_t, uint32_t, uint32_t, void *, uint32_t, void **);
extern int mx_get_endpoint_addr(void *, address_t *);
extern int mx_isend(void *, piece_t *, uint32_t, address_t, uint64_t, void *, void **);
extern int mx_irecv(void *, piece_t *, uint32_t, uint64_t, uint64_t, void *, void **);
extern int mx_wait(void *, void **, uint32_t, void *, uint32_t *);
extern int mx_decompose_endpoint_addr(address_t, uint64_t *, uint32_t *);
extern int mx_get_info(void *, int, void *, uint32_t, void *, uint32_t);
extern int mx_close_endpoint(void *);
extern int mx_finalize(void);

#define CHECK(fact)                                                \
  do {                                                             \
    if (!(fact)) {                                                 \
      fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #fact);   \
      exit(1);                                                     \
    }                                                              \
  } while (0)

static uint32_t word_at(const outcome_t *outcome, size_t offset) {
  uint32_t word;
  memcpy(&word, (const char *)outcome + offset, sizeof word);
  return word;
}

static void send_and_receive(void *endpoint, address_t self) {
  char sent[] = "by the tables alone", received[64] = "";
  piece_t from = {sent, sizeof sent}, to = {received, sizeof received};
  void *send = NULL, *receive = NULL;
  outcome_t outcome;
  uint32_t result = 0;
  CHECK(mx_irecv(endpoint, &to, 1, 0x1200, 0xff00, (void *)0x5ca1ab1e, &receive) == 0 && receive != NULL);
  CHECK(mx_isend(endpoint, &from, 1, self, 0x1234, (void *)0xc0ffee, &send) == 0 && send != NULL);
  memset(&outcome, 0xee, sizeof outcome);
  CHECK(mx_wait(endpoint, &receive, 1000, &outcome, &result) == 0 && result == 1 && receive == NULL);
  CHECK(word_at(&outcome, 0) == 0 && memcmp((char *)&outcome + 8, &self, sizeof self) == 0);
  CHECK(outcome.words[3] == 0x1234 && word_at(&outcome, 32) == sizeof sent && word_at(&outcome, 36) == sizeof sent);
  CHECK(outcome.words[5] == 0x5ca1ab1e && strcmp(sent, received) == 0);
  CHECK(mx_wait(endpoint, &send, 1000, &outcome, &result) == 0 && result == 1 && outcome.words[5] == 0xc0ffee);
}

int main(void) {
  void *endpoint = NULL;
  address_t self;
  uint64_t nic = 0, nics[2] = {0, 1};
  uint32_t id = 0, count = 0;
  CHECK(sizeof(outcome_t) == 48 && MX_ERRORS_RETURN != MX_ERRORS_ARE_FATAL);
  CHECK(mx_set_error_handler(MX_ERRORS_RETURN) == MX_ERRORS_ARE_FATAL);
  CHECK(MX_ERRORS_RETURN((char *)"a message", 17) == 17);
  CHECK(mx__init_api(0x201) == 38 && mx__init_api(0) == 38 && mx__init_api(0x301) == 0);
  CHECK(mx_open_endpoint(0xffffffff, 3, 0x12345, NULL, 0, &endpoint) == 0 && endpoint != NULL);
  CHECK(mx_get_endpoint_addr(endpoint, &self) == 0);
  CHECK(mx_decompose_endpoint_addr(self, &nic, &id) == 0 && id == 3);
  CHECK(mx_get_info(NULL, 1, NULL, 0, &count, sizeof count) == 0 && count == 1);
  CHECK(mx_get_info(NULL, 2, NULL, 0, nics, sizeof nics) == 0 && nics[0] == nic && nics[1] == 0);
  send_and_receive(endpoint, self);
  CHECK(mx_close_endpoint(endpoint) == 0 && mx_finalize() == 0);
  puts("ok");
  return 0;
}
