/* What the calls check and say, apart from messages. One test for each name; see run() in check.h. */
#include "check.h"
#include "mx_internals/mx__driver_interface.h"
#include "mx_internals/mx__fops.h"
#include "mx_raw.h"

extern int mx__regcache_clean(void *start, size_t length);

/* --- Error handlers --- */

static int told_code;
static char told_text[256];

static mx_return_t note(char *message, mx_return_t code) {
  told_code = (int)code;
  snprintf(told_text, sizeof told_text, "%s", message);
  return code;
}

static mx_return_t forgive(char *message, mx_return_t code) {
  note(message, code);
  return MX_SUCCESS;
}

/* The program ends in these, and the last line says that it did not. */

static void fatal_before_init(void) {
  OK(mx_open_endpoint(0, 0, 0, NULL, 0, &endpoint));
  fputs("went on\n", stderr);
}

static void fatal_status(void) {
  char byte;
  OK(mx_init());
  OK(mx_open_endpoint(0, 0, 0, NULL, 0, &endpoint));
  OK(mx_get_endpoint_addr(endpoint, &self));
  send("two", 2, 0);
  finish(receive(&byte, 1, 0, ALL));
  fputs("went on\n", stderr);
}

static void fatal_not(void) {
  OK(mx_init());
  CHECK(mx_init() == MX_ALREADY_INITIALIZED);
}

static void handlers(void) {
  mx_param_t own;
  mx_request_t request = NULL;
  char byte;
  CHECK(mx_set_error_handler(note) == MX_ERRORS_ARE_FATAL);
  CHECK(mx_open_endpoint(0, 0, 0, NULL, 0, &endpoint) == MX_NOT_INITIALIZED && told_code == MX_NOT_INITIALIZED);
  CHECK(strstr(told_text, "mx_open_endpoint") && strstr(told_text, "MX_NOT_INITIALIZED"));
  CHECK(mx_set_error_handler(forgive) == note);
  OK(mx_open_endpoint(0, 0, 0, NULL, 0, &endpoint));
  CHECK(mx_set_error_handler(NULL) == forgive && mx_set_error_handler(MX_ERRORS_RETURN) == MX_ERRORS_ARE_FATAL);
  own.key = MX_PARAM_ERROR_HANDLER;
  own.val.error_handler = forgive;
  begin(&own, 1);
  told_code = 0;
  CHECK(mx_test(endpoint, &request, NULL, NULL) == MX_SUCCESS && told_code == MX_BAD_REQUEST);
  /* What becomes of a request is told by numbers that no call returns. */
  send("two", 2, 0);
  CHECK(finish(receive(&byte, 1, 0, ALL)).code == MX_STATUS_SUCCESS && told_code == 95);
  CHECK(strstr(mx_strerror((mx_return_t)95), "longer"));
}

static void texts(void) {
  int code;
  for (code = 0; code < 44; code++) {
    CHECK(strlen(mx_strerror((mx_return_t)code)) > 0);
    CHECK(code == 0 || strcmp(mx_strerror((mx_return_t)code), mx_strerror((mx_return_t)(code - 1))) != 0);
  }
  for (code = 0; code < 17; code++) CHECK(!strstr(mx_strstatus((mx_status_code_t)code), "unknown"));
  CHECK(strstr(mx_strerror((mx_return_t)4711), "unknown") && strstr(mx_strerror((mx_return_t)-1), "unknown"));
  CHECK(strstr(mx_strstatus((mx_status_code_t)17), "unknown"));
}

/* --- Beginning, opening, closing --- */

static void initialisation(void) {
  uint64_t nic;
  uint32_t count;
  mx_set_error_handler(MX_ERRORS_RETURN);
  CHECK(mx_board_number_to_nic_id(0, &nic) == MX_NOT_INITIALIZED);
  CHECK(mx_get_info(NULL, MX_NIC_COUNT, NULL, 0, &count, 4) == MX_NOT_INITIALIZED);
  CHECK(mx__init_api(0x0201) == MX_BAD_LIB_VERSION && mx__init_api(0) == MX_BAD_LIB_VERSION);
  CHECK(mx__init_api(0x0399) == MX_SUCCESS && mx_init() == MX_ALREADY_INITIALIZED);
  CHECK(mx__init_api(0) == MX_ALREADY_INITIALIZED);
  OK(mx_finalize());
  OK(mx_finalize());
  begin(NULL, 0);
  OK(mx_finalize());
  /* Endpoints outlive it. */
  send("", 0, 1);
  CHECK(finish(receive(NULL, 0, 1, ALL)).code == MX_STATUS_SUCCESS);
  OK(mx_close_endpoint(endpoint));
}

static mx_return_t open_with(mx_param_key_t key, uint32_t bits, uint32_t shift) {
  mx_param_t param;
  mx_endpoint_t other;
  param.key = key;
  param.val.context_id.bits = (uint8_t)bits;
  param.val.context_id.shift = (uint8_t)shift;
  return mx_open_endpoint(MX_ANY_NIC, MX_ANY_ENDPOINT, KEY, &param, 1, &other);
}

static void opening(void) {
  mx_endpoint_t all[64], one, foreign = (mx_endpoint_t)&told_code;
  int at;
  begin(NULL, 0);
  CHECK(mx_open_endpoint(0, 5, KEY, NULL, 1, &one) == MX_BAD_PARAM_LIST);
  CHECK(open_with((mx_param_key_t)3, 0, 0) == MX_BAD_PARAM_NAME);
  CHECK(open_with(MX_PARAM_CONTEXT_ID, 17, 0) == MX_BAD_PARAM_VAL);
  CHECK(open_with(MX_PARAM_CONTEXT_ID, 16, 49) == MX_BAD_PARAM_VAL);
  OK(open_with(MX_PARAM_CONTEXT_ID, 16, 48));
  OK(open_with(MX_PARAM_UNEXP_QUEUE_MAX, 1, 0));
  CHECK(mx_open_endpoint(9, 5, KEY, NULL, 0, &one) == MX_BOARD_UNKNOWN);
  CHECK(mx_open_endpoint(0, 64, KEY, NULL, 0, &one) == MX_BAD_ENDPOINT);
  OK(mx_open_endpoint(0, 63, KEY, NULL, 0, &one));
  CHECK(mx_open_endpoint(0, 63, KEY, NULL, 0, &one) == MX_BUSY);
  OK(mx_close_endpoint(one));
  for (at = 0; at < 61; at++) OK(mx_open_endpoint(MX_ANY_NIC, MX_ANY_ENDPOINT, KEY, NULL, 0, &all[at]));
  CHECK(mx_open_endpoint(MX_ANY_NIC, MX_ANY_ENDPOINT, KEY, NULL, 0, &one) == MX_BUSY);
  OK(mx_close_endpoint(all[7]));
  CHECK(mx_close_endpoint(all[7]) == MX_BAD_ENDPOINT && mx_close_endpoint(NULL) == MX_BAD_ENDPOINT);
  CHECK(mx_close_endpoint(foreign) == MX_BAD_ENDPOINT && mx_progress(foreign) == MX_BAD_ENDPOINT);
  OK(mx_open_endpoint(0, MX_ANY_ENDPOINT, KEY, NULL, 0, &one));
  CHECK(mx_close_endpoint(all[7]) == MX_BAD_ENDPOINT);
}

/* --- Information --- */

static uint32_t ask(mx_get_info_key_t key) {
  uint32_t value = 0xeeeeeeee, board = 0;
  CHECK(mx_get_info(NULL, key, &board, sizeof board, &value, 3) == MX_BAD_INFO_LENGTH);
  CHECK(mx_get_info(NULL, key, &board, sizeof board, NULL, 4) == MX_BAD_INFO_VAL);
  OK(mx_get_info(NULL, key, &board, sizeof board, &value, sizeof value));
  OK(mx_get_info(endpoint, key, NULL, 0, &value, sizeof value));
  return value;
}

static void information(void) {
  uint64_t nics[2] = {0, 1}, nic = 0;
  uint32_t value, board = 0, counters;
  uint8_t narrow = 9;
  char labels[MX_MAX_STR_LEN * 128], text[MX_MAX_STR_LEN];
  int key;
  begin(NULL, 0);
  CHECK(ask(MX_NIC_COUNT) == 1 && ask(MX_MAX_NATIVE_ENDPOINTS) == 64 && ask(MX_NATIVE_REQUESTS) > 1000);
  CHECK(ask(MX_PORT_COUNT) == 1 && ask(MX_PIO_SEND_MAX) == 128 && ask(MX_COPY_SEND_MAX) == 32768);
  CHECK(ask(MX_NET_TYPE) == MX_NET_ETHER && ask(MX_LINE_SPEED) == MX_SPEED_10G);
  ask(MX_NUMA_NODE);
  counters = ask(MX_COUNTERS_COUNT);
  CHECK(counters > 0 && counters <= 128);
  OK(mx_get_info(NULL, MX_COUNTERS_LABELS, NULL, 0, labels, counters * MX_MAX_STR_LEN));
  CHECK(strlen(labels) > 0 && strlen(labels) < MX_MAX_STR_LEN);
  OK(mx_get_info(endpoint, MX_COUNTERS_VALUES, NULL, 0, labels, counters * 4));
  for (key = MX_PRODUCT_CODE; key <= MX_SERIAL_NUMBER; key++)
    OK(mx_get_info(NULL, (mx_get_info_key_t)key, &board, 4, text, sizeof text));
  CHECK(mx_get_info(NULL, MX_NIC_IDS, NULL, 0, nics, 8) == MX_BAD_INFO_LENGTH && nics[0] == 0);
  OK(mx_get_info(NULL, MX_NIC_IDS, NULL, 0, nics, sizeof nics));
  OK(mx_board_number_to_nic_id(0, &nic));
  CHECK(nics[0] == nic && nic != 0 && nic >> 48 == 0 && nics[1] == 0);
  CHECK(mx_get_info(NULL, (mx_get_info_key_t)0, NULL, 0, &value, 4) == MX_BAD_INFO_KEY);
  CHECK(mx_get_info(NULL, (mx_get_info_key_t)17, NULL, 0, NULL, 0) == MX_BAD_INFO_KEY);
  /* The number of a board comes in one byte or in four; what lies beyond the one is nobody's business. */
  CHECK(mx_get_info(NULL, MX_NUMA_NODE, &narrow, 1, &value, 4) == MX_BOARD_UNKNOWN);
  board = 0x100;
  OK(mx_get_info(NULL, MX_NUMA_NODE, &board, 1, &value, 4));
  CHECK(mx_get_info(NULL, MX_NUMA_NODE, &board, 4, &value, 4) == MX_BOARD_UNKNOWN);
  CHECK(mx_get_info(NULL, MX_NUMA_NODE, NULL, 0, &value, 4) == MX_BAD_INFO_VAL);
}

static void names(void) {
  char name[MX_MAX_HOSTNAME_LEN];
  uint64_t nic = 0, again = 0;
  uint32_t board = 9;
  begin(NULL, 0);
  OK(mx_board_number_to_nic_id(0, &nic));
  OK(mx_nic_id_to_board_number(nic, &board));
  CHECK(board == 0);
  OK(mx_nic_id_to_hostname(nic, name));
  CHECK(strstr(name, ":0"));
  OK(mx_hostname_to_nic_id(name, &again));
  CHECK(again == nic);
  CHECK(mx_hostname_to_nic_id((char *)"nobody:0", &again) == MX_HOST_NOT_FOUND);
  CHECK(mx_nic_id_to_hostname(1, name) == MX_HOST_NOT_FOUND);
  CHECK(mx_board_number_to_nic_id(9, &nic) == MX_BOARD_UNKNOWN);
  CHECK(mx_nic_id_to_board_number(1, &board) == MX_BOARD_UNKNOWN);
}

static void boards(void) {
  mx_mapper_state_t state;
  mx_endpt_handle_t handle = MX__INVALID_HANDLE;
  mx_raw_endpoint_t raw = NULL;
  uint64_t nic;
  begin(NULL, 0);
  memset(&state, 0, sizeof state);
  OK(mx_board_number_to_nic_id(0, &nic));
  OK(mx_open_board(0, &handle));
  OK(mx__get_mapper_state(handle, &state));
  /* Programs that name different mappers take each other for unreachable. */
  CHECK(state.mapper_mac[0] == 2 && state.mapper_mac[5] == 1 && state.network_configured == 1);
  CHECK(mx_open_board(9, &handle) == MX_BOARD_UNKNOWN && mx_open_board(-1, &handle) == MX_BOARD_UNKNOWN);
  CHECK(mx__get_mapper_state(MX__INVALID_HANDLE, &state) == MX_BOARD_UNKNOWN);
  CHECK(mx__regcache_clean(&state, sizeof state) == 0);
  CHECK(mx_raw_open_endpoint(9, NULL, 0, &raw) == MX_BOARD_UNKNOWN);
  CHECK(mx_raw_open_endpoint(0, NULL, 0, &raw) == MX_NO_DEV && raw == NULL);
  CHECK(mx_raw_handle(raw) == MX__INVALID_HANDLE && mx_raw_remove_peer(raw, nic) == MX_BAD_ENDPOINT);
}

/* --- Addresses and connections --- */

static void addresses(void) {
  mx_endpoint_addr_t address, copy, nobody;
  mx_endpoint_t other;
  uint64_t nic = 0, board_nic;
  uint32_t id = 9, session = 0, next = 0;
  void *context = &id;
  memset(&nobody, 0, sizeof nobody);
  begin(NULL, 0);
  OK(mx_board_number_to_nic_id(0, &board_nic));
  OK(mx_decompose_endpoint_addr2(self, &nic, &id, &session));
  CHECK(nic == board_nic && id == 0);
  OK(mx_connect(endpoint, nic, id, KEY, 1, &address));
  OK(mx_get_endpoint_addr_context(address, &context));
  CHECK(context == NULL);
  OK(mx_set_endpoint_addr_context(address, &session));
  memcpy(&copy, &address, MX_SIZEOF_ADDR);
  OK(mx_connect(endpoint, nic, id, KEY, MX_INFINITE, &address));
  OK(mx_get_endpoint_addr_context(copy, &context));
  CHECK(context == &session);
  OK(mx_open_endpoint(0, 1, KEY, NULL, 0, &other));
  OK(mx_get_endpoint_addr(other, &address));
  OK(mx_get_endpoint_addr_context(address, &context));
  CHECK(context == NULL);
  OK(mx_close_endpoint(other));
  OK(mx_close_endpoint(endpoint));
  /* An address outlives nothing: what is asked of it then is answered, and means nothing. */
  mx_get_endpoint_addr_context(copy, &context);
  mx_set_endpoint_addr_context(nobody, &id);
  OK(mx_open_endpoint(0, 0, KEY, NULL, 0, &endpoint));
  OK(mx_get_endpoint_addr(endpoint, &address));
  OK(mx_decompose_endpoint_addr2(address, &nic, &id, &next));
  CHECK(session != next);
  CHECK(finish(send_to(copy, "late", 4, 1)).code == MX_STATUS_BAD_SESSION);
}

static void connections(void) {
  static const struct {
    uint32_t id, key;
    mx_return_t code;
    mx_status_code_t status;
  } all[] = {{0, KEY, MX_SUCCESS, MX_STATUS_SUCCESS},
             {0, KEY + 1, MX_BAD_CONNECTION_KEY, MX_STATUS_BAD_KEY},
             {31, KEY, MX_CONNECTION_FAILED, MX_STATUS_ENDPOINT_CLOSED},
             {64, KEY, MX_BAD_ENDPOINT_ID, MX_STATUS_BAD_ENDPOINT},
             {0x100, KEY, MX_BAD_ENDPOINT_ID, MX_STATUS_BAD_ENDPOINT}};
  mx_endpoint_addr_t address;
  mx_request_t request;
  mx_status_t status;
  uint64_t nic;
  uint32_t result;
  size_t at;
  begin(NULL, 0);
  OK(mx_board_number_to_nic_id(0, &nic));
  for (at = 0; at < sizeof all / sizeof *all; at++) {
    CHECK(mx_connect(endpoint, nic, all[at].id, all[at].key, 1000, &address) == all[at].code);
    OK(mx_iconnect(endpoint, nic, all[at].id, all[at].key, 0x77, &address, &request));
    OK(mx_wait_any(endpoint, SOON, 0x77, ALL, &status, &result));
    CHECK(result == 1 && status.code == all[at].status && status.context == &address && status.match_info == 0x77);
  }
  OK(mx_iconnect(endpoint, nic, 0, KEY, 0, NULL, &request));
  status = finish(request);
  CHECK(memcmp(&status.source, &self, sizeof self) == 0);
  CHECK(mx_connect(endpoint, 1, 0, KEY, 1000, &address) == MX_NIC_NOT_FOUND);
  CHECK(mx_iconnect(endpoint, 1, 0, KEY, 0, NULL, &request) == MX_NIC_NOT_FOUND);
  CHECK(mx_disconnect(endpoint, self) == MX_BAD_ENDPOINT);
}

/* --- Requests --- */

static void cancelling(void) {
  mx_request_t request, gone, matched, sent;
  mx_status_t status;
  uint32_t result = 7;
  char byte = 0;
  begin(NULL, 0);
  gone = request = receive(&byte, 1, 1, ALL);
  OK(mx_cancel(endpoint, &request, &result));
  CHECK(result == 1 && request == NULL);
  CHECK(mx_test(endpoint, &gone, &status, &result) == MX_BAD_REQUEST);
  sent = send("x", 1, 1);
  CHECK(!is_done(&sent) && byte == 0);
  CHECK(mx_cancel(endpoint, &sent, &result) == MX_CANCEL_NOT_SUPPORTED && sent != NULL);
  OK(mx_test_any(endpoint, 0, 0, &status, &result));
  CHECK(result == 0);
  matched = receive(&byte, 1, 1, ALL);
  result = 7;
  OK(mx_cancel(endpoint, &matched, &result));
  CHECK(result == 0 && matched != NULL && is_done(&matched) && is_done(&sent) && byte == 'x');
  CHECK(mx_cancel(endpoint, &matched, &result) == MX_BAD_REQUEST);
}

static void requests(void) {
  mx_request_t request, gone, sent;
  mx_endpoint_t other;
  mx_status_t status;
  uint32_t result = 7;
  void *context = NULL;
  mx_segment_t segment = {&result, 0};
  begin(NULL, 0);
  OK(mx_irecv(endpoint, &segment, 1, 1, ALL, &other, &request));
  OK(mx_context(&request, &context));
  CHECK(context == &other && mx_ibuffered(endpoint, &request, &result) == MX_BAD_REQUEST);
  OK(mx_set_request_timeout(endpoint, request, 0));
  OK(mx_set_request_timeout(endpoint, NULL, 1));
  sent = send("", 0, 2);
  OK(mx_ibuffered(endpoint, &sent, &result));
  CHECK(result == 1 && !is_done(&sent));
  OK(mx_buffered(endpoint, &sent, SOON, &result));
  OK(mx_forget(endpoint, &sent));
  CHECK(sent == NULL && mx_forget(endpoint, &sent) == MX_BAD_REQUEST);
  OK(mx_isend(endpoint, NULL, 0, self, 1, NULL, NULL));
  gone = request;
  CHECK(finish(request).context == &other);
  CHECK(mx_test(endpoint, &gone, &status, &result) == MX_BAD_REQUEST && mx_context(&gone, &context) == MX_BAD_REQUEST);
  CHECK(mx_set_request_timeout(endpoint, gone, 0) == MX_BAD_REQUEST);
  OK(mx_close_endpoint(endpoint));
  /* Of two that are new, the first requests are alike but for their endpoints. */
  OK(mx_open_endpoint(0, 8, KEY, NULL, 0, &endpoint));
  OK(mx_open_endpoint(0, 9, KEY, NULL, 0, &other));
  OK(mx_irecv(other, &segment, 1, 1, ALL, NULL, &gone));
  request = receive(NULL, 0, 1, ALL);
  CHECK(mx_test(other, &request, &status, &result) == MX_BAD_REQUEST && !is_done(&request));
  CHECK(mx_iput(endpoint, &result, 4, self, 0, NULL, &request) == MX_FAILURE);
  CHECK(mx_iget(endpoint, &result, 4, self, 0, NULL, &request) == MX_FAILURE);
  OK(mx_close_endpoint(endpoint));
  CHECK(mx_context(&request, &context) == MX_BAD_REQUEST);
}

static const struct test tests[] = {
    {"fatal_before_init", fatal_before_init},
    {"fatal_status", fatal_status},
    {"fatal_not", fatal_not},
    {"handlers", handlers},
    {"texts", texts},
    {"initialisation", initialisation},
    {"opening", opening},
    {"information", information},
    {"names", names},
    {"boards", boards},
    {"addresses", addresses},
    {"connections", connections},
    {"cancelling", cancelling},
    {"requests", requests},
};

int main(int argc, char **argv) {
  return run(tests, sizeof tests / sizeof *tests, argc, argv);
}
