/*
 * The C interface of MX (Myrinet Express), as this library offers it: message passing by matching between endpoints.
 *
 * A program opens an endpoint, connects it to others, and posts sends and receives; each becomes a request that is
 * tested or waited for. A receive names 64 bits and a mask, and takes the oldest message whose bits are the same where
 * the mask has ones.
 *
 * Four things that surprise:
 *   - A timeout is in milliseconds, and 0 (MX_INFINITE) is for ever.
 *   - A wait that ends without anything to tell returns MX_SUCCESS and sets its result to 0.
 *   - mx_endpoint_addr_t goes by value. mx_set_request_timeout alone takes a request by value.
 *   - What goes wrong is first told to the error handler, and the one a program starts with ends the program.
 *     MX_ERRORS_RETURN is the handler that only returns the code.
 */
#ifndef MYRIEXPRESS_H
#define MYRIEXPRESS_H

#include <stddef.h>
#if defined(__STDC_HOSTED__) && !__STDC_HOSTED__
#include <stdint.h>
#else
#include <inttypes.h> /* Programs print the numbers below as it says. */
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* --- Constants ------------------------------------------------------------------------------------------------- */

/* The version of this interface: the upper byte must be that of the library. */
#define MX_API 0x301

/* Bytes of a string that mx_get_info gives, and of the name that mx_nic_id_to_hostname gives. */
#define MX_MAX_STR_LEN 128
#define MX_MAX_HOSTNAME_LEN 80

#define MX_SIZEOF_ADDR 16

#define MX_ANY_NIC 0xffffffffU
#define MX_ANY_ENDPOINT 0xffffffffU

/* A timeout. There is none that means "do not wait"; the calls that begin with mx_i, and the tests, do not wait. */
#define MX_INFINITE 0

#define MX_MAX_SEGMENTS 256

/* A mask that ignores nothing. */
#define MX_MATCH_MASK_NONE (~(uint64_t)0)
#define MX_CONTEXT_ID_BITS_MAX 16

/* The halves of a match value. */
#define MX_U32(x) ((uint32_t)((uint64_t)(x) >> 32))
#define MX_L32(x) ((uint32_t)((uint64_t)(x) & 0xffffffffU))

/* What programs look for, to know what they may use. */
#define MX_HAS_NET_TYPE 1

/* --- Enumerations ---------------------------------------------------------------------------------------------- */

/* What a call returns. */
typedef enum {
  MX_SUCCESS = 0,
  MX_BAD_BAD_BAD = 1,
  MX_FAILURE = 2,
  MX_ALREADY_INITIALIZED = 3,
  MX_NOT_INITIALIZED = 4,
  MX_NO_DEV = 5,
  MX_NO_DRIVER = 6,
  MX_NO_PERM = 7,
  MX_BOARD_UNKNOWN = 8,
  MX_BAD_ENDPOINT = 9,
  MX_BAD_SEG_LIST = 10,
  MX_BAD_SEG_MEM = 11,
  MX_BAD_SEG_CNT = 12,
  MX_BAD_REQUEST = 13,
  MX_BAD_MATCH_MASK = 14,
  MX_NO_RESOURCES = 15,
  MX_BAD_ADDR_LIST = 16,
  MX_BAD_ADDR_COUNT = 17,
  MX_BAD_ROOT = 18,
  MX_NOT_COMPLETED = 19,
  MX_BUSY = 20,
  MX_BAD_INFO_KEY = 21,
  MX_BAD_INFO_VAL = 22,
  MX_BAD_NIC = 23,
  MX_BAD_PARAM_LIST = 24,
  MX_BAD_PARAM_NAME = 25,
  MX_BAD_PARAM_VAL = 26,
  MX_BAD_HOSTNAME_ARGS = 27,
  MX_HOST_NOT_FOUND = 28,
  MX_REQUEST_PENDING = 29,
  MX_TIMEOUT = 30,
  MX_NO_MATCH = 31,
  MX_BAD_ENDPOINT_ID = 32,
  MX_CONNECTION_FAILED = 33,
  MX_BAD_CONNECTION_KEY = 34,
  MX_BAD_INFO_LENGTH = 35,
  MX_NIC_NOT_FOUND = 36,
  MX_BAD_KERNEL_VERSION = 37,
  MX_BAD_LIB_VERSION = 38,
  MX_NIC_DEAD = 39,
  MX_CANCEL_NOT_SUPPORTED = 40,
  MX_CLOSE_IN_HANDLER = 41,
  MX_BAD_MATCHING_FOR_CONTEXT_ID_MASK = 42,
  MX_NOT_SUPPORTED_WITH_CONTEXT_ID = 43
} mx_return_t;

/* What became of a request. */
typedef enum {
  MX_STATUS_SUCCESS = 0,
  MX_STATUS_PENDING = 1,
  MX_STATUS_BUFFERED = 2,
  MX_STATUS_REJECTED = 3,
  MX_STATUS_TIMEOUT = 4,
  MX_STATUS_TRUNCATED = 5,
  MX_STATUS_CANCELLED = 6,
  MX_STATUS_ENDPOINT_UNKNOWN = 7,
  MX_STATUS_ENDPOINT_CLOSED = 8,
  MX_STATUS_ENDPOINT_UNREACHABLE = 9,
  MX_STATUS_BAD_SESSION = 10,
  MX_STATUS_BAD_KEY = 11,
  MX_STATUS_BAD_ENDPOINT = 12,
  MX_STATUS_BAD_RDMAWIN = 13,
  MX_STATUS_ABORTED = 14,
  MX_STATUS_EVENTQ_FULL = 15,
  MX_STATUS_NO_RESOURCES = 16
} mx_status_code_t;

/* What mx_open_endpoint may be told. */
typedef enum {
  MX_PARAM_ERROR_HANDLER = 0,
  MX_PARAM_UNEXP_QUEUE_MAX = 1,
  MX_PARAM_CONTEXT_ID = 2
} mx_param_key_t;

/* What mx_get_info tells, and the type of the answer. */
typedef enum {
  MX_NIC_COUNT = 1,            /* uint32_t */
  MX_NIC_IDS = 2,              /* uint64_t[count + 1], the last one 0 */
  MX_MAX_NATIVE_ENDPOINTS = 3, /* uint32_t, of a board */
  MX_NATIVE_REQUESTS = 4,      /* uint32_t */
  MX_COUNTERS_COUNT = 5,       /* uint32_t */
  MX_COUNTERS_LABELS = 6,      /* char[count][MX_MAX_STR_LEN] */
  MX_COUNTERS_VALUES = 7,      /* uint32_t[count], of a board */
  MX_PRODUCT_CODE = 8,         /* string */
  MX_PART_NUMBER = 9,          /* string */
  MX_SERIAL_NUMBER = 10,       /* string */
  MX_PORT_COUNT = 11,          /* uint32_t */
  MX_PIO_SEND_MAX = 12,        /* uint32_t, bytes */
  MX_COPY_SEND_MAX = 13,       /* uint32_t, bytes: beyond it a send waits for its receiver */
  MX_NUMA_NODE = 14,           /* uint32_t, of a board */
  MX_NET_TYPE = 15,            /* mx_net_type_t */
  MX_LINE_SPEED = 16           /* mx_line_speed_t */
} mx_get_info_key_t;

typedef enum { MX_NET_MYRI = 0, MX_NET_ETHER = 1 } mx_net_type_t;

typedef enum { MX_SPEED_2G = 0, MX_SPEED_10G = 1, MX_SPEED_OPEN_MX = 2 } mx_line_speed_t;

typedef enum { MX_HOST_GM = 1, MX_HOST_XM = 2, MX_HOST_MX = 3, MX_HOST_MXvM = 4 } mx_host_type_t;

/* --- Types ----------------------------------------------------------------------------------------------------- */

typedef struct mx_endpoint *mx_endpoint_t;

/* NULL is no request. */
typedef union mx_request *mx_request_t;

/* Who can be sent to. It means something only in the process, and with the endpoint, that it was given to. */
typedef struct {
  uint64_t opaque[2];
} mx_endpoint_addr_t;

typedef void *mx_segment_ptr_t;

typedef struct {
  mx_segment_ptr_t segment_ptr;
  uint32_t segment_length;
} mx_segment_t;

typedef struct {
  mx_status_code_t code;
  mx_endpoint_addr_t source; /* of a send: where it went */
  uint64_t match_info;
  uint32_t msg_length;  /* bytes that were sent */
  uint32_t xfer_length; /* bytes that were taken */
  void *context;
} mx_status_t;

/* What it returns takes the place of the code: as what the call returns, or as the code of the request's status. */
typedef mx_return_t (*mx_error_handler_t)(char *message, mx_return_t code);

typedef struct {
  mx_param_key_t key;
  union {
    mx_error_handler_t error_handler;
    uint32_t unexp_queue_max;
    struct {
      uint8_t bits;
      uint8_t shift;
    } context_id;
  } val;
} mx_param_t;

/* --- Set-up ---------------------------------------------------------------------------------------------------- */

#define mx_init() mx__init_api(MX_API)
mx_return_t mx__init_api(int api_version);
mx_return_t mx_finalize(void);

/* Two handlers: the first ends the program, the second does nothing but return the code. */
extern const mx_error_handler_t MX_ERRORS_ARE_FATAL;
extern const mx_error_handler_t MX_ERRORS_RETURN;

/* Returns the handler that was in charge before. Allowed before mx_init. */
mx_error_handler_t mx_set_error_handler(mx_error_handler_t new_handler);

const char *mx_strerror(mx_return_t code);
const char *mx_strstatus(mx_status_code_t code);

mx_return_t mx_open_endpoint(uint32_t board_number, uint32_t endpoint_id, uint32_t key, mx_param_t *params,
                             uint32_t params_count, mx_endpoint_t *endpoint);
mx_return_t mx_close_endpoint(mx_endpoint_t endpoint);

/* Let every call that waits on this endpoint return with nothing done, and mx_connect with MX_TIMEOUT. */
mx_return_t mx_wakeup(mx_endpoint_t endpoint);

/* --- Information and names ------------------------------------------------------------------------------------- */

/* `endpoint` may be NULL; what belongs to a board is then asked of the board whose number is at `in_val`. */
mx_return_t mx_get_info(mx_endpoint_t endpoint, mx_get_info_key_t key, void *in_val, uint32_t in_len, void *out_val,
                        uint32_t out_len);

mx_return_t mx_hostname_to_nic_id(char *hostname, uint64_t *nic_id);
mx_return_t mx_nic_id_to_hostname(uint64_t nic_id, char *hostname);
mx_return_t mx_board_number_to_nic_id(uint32_t board_number, uint64_t *nic_id);
mx_return_t mx_nic_id_to_board_number(uint64_t nic_id, uint32_t *board_number);

/* --- Addresses and connections --------------------------------------------------------------------------------- */

mx_return_t mx_connect(mx_endpoint_t endpoint, uint64_t nic_id, uint32_t endpoint_id, uint32_t key, uint32_t timeout,
                       mx_endpoint_addr_t *address);
mx_return_t mx_get_endpoint_addr(mx_endpoint_t endpoint, mx_endpoint_addr_t *address);
mx_return_t mx_decompose_endpoint_addr(mx_endpoint_addr_t address, uint64_t *nic_id, uint32_t *endpoint_id);

/* --- Sending and receiving ------------------------------------------------------------------------------------- */

mx_return_t mx_isend(mx_endpoint_t endpoint, mx_segment_t *segments, uint32_t segments_count,
                     mx_endpoint_addr_t destination, uint64_t match_info, void *context, mx_request_t *request);

/* As mx_isend, but it is not done before a receive has taken the message. */
mx_return_t mx_issend(mx_endpoint_t endpoint, mx_segment_t *segments, uint32_t segments_count,
                      mx_endpoint_addr_t destination, uint64_t match_info, void *context, mx_request_t *request);
mx_return_t mx_irecv(mx_endpoint_t endpoint, mx_segment_t *segments, uint32_t segments_count, uint64_t match_info,
                     uint64_t match_mask, void *context, mx_request_t *request);

/* --- Completion ------------------------------------------------------------------------------------------------ */

/* When it is done: *result is 1, *status is filled, *request is NULL. Otherwise *result is 0. */
mx_return_t mx_test(mx_endpoint_t endpoint, mx_request_t *request, mx_status_t *status, uint32_t *result);
mx_return_t mx_wait(mx_endpoint_t endpoint, mx_request_t *request, uint32_t timeout, mx_status_t *status,
                    uint32_t *result);

/* The request that was done first among those whose match_info fits. */
mx_return_t mx_test_any(mx_endpoint_t endpoint, uint64_t match_info, uint64_t match_mask, mx_status_t *status,
                        uint32_t *result);
mx_return_t mx_wait_any(mx_endpoint_t endpoint, uint32_t timeout, uint64_t match_info, uint64_t match_mask,
                        mx_status_t *status, uint32_t *result);

/* The request that was done first. It remains to be tested. */
mx_return_t mx_ipeek(mx_endpoint_t endpoint, mx_request_t *request, uint32_t *result);
mx_return_t mx_peek(mx_endpoint_t endpoint, uint32_t timeout, mx_request_t *request, uint32_t *result);

/* The oldest message that no receive has taken yet. It stays where it is. */
mx_return_t mx_iprobe(mx_endpoint_t endpoint, uint64_t match_info, uint64_t match_mask, mx_status_t *status,
                      uint32_t *result);
mx_return_t mx_probe(mx_endpoint_t endpoint, uint32_t timeout, uint64_t match_info, uint64_t match_mask,
                     mx_status_t *status, uint32_t *result);

/* Of a send: may its memory be used again already? */
mx_return_t mx_ibuffered(mx_endpoint_t endpoint, mx_request_t *request, uint32_t *result);
mx_return_t mx_buffered(mx_endpoint_t endpoint, mx_request_t *request, uint32_t timeout, uint32_t *result);

mx_return_t mx_context(mx_request_t *request, void **context);

/* *result is 1: the request is gone, and nothing more is heard of it. 0: it is done like any other. */
mx_return_t mx_cancel(mx_endpoint_t endpoint, mx_request_t *request, uint32_t *result);

#ifdef __cplusplus
}
#endif

/* Programs differ in which of the two headers they include for what; either gives everything. */
#include "mx_extensions.h"

#endif
