/* Sizes, offsets and numbers of our headers, as compiled programs of MX have them. Nothing runs: it compiles or not. */
#include "mx_internals/mx__driver_interface.h"
#include "mx_internals/mx__fops.h"
#include "mx_io.h"
#include "mx_raw.h"
#include "myriexpress.h"

#ifdef __cplusplus
#define SAYS(fact) static_assert(fact, #fact)
#define ALIGNMENT(type) alignof(type)
#else
#define SAYS(fact) _Static_assert(fact, #fact)
#define ALIGNMENT(type) _Alignof(type)
#endif

#ifdef __i386__
#define EITHER(wide, narrow) (narrow)
#else
#define EITHER(wide, narrow) (wide)
#endif

#define SIZE(type, wide, wide_alignment, narrow) \
  SAYS(sizeof(type) == EITHER(wide, narrow));    \
  SAYS(ALIGNMENT(type) == EITHER(wide_alignment, 4))
#define AT(type, member, wide, narrow) SAYS(offsetof(type, member) == EITHER(wide, narrow))

SIZE(mx_endpoint_t, 8, 8, 4);
SIZE(mx_request_t, 8, 8, 4);
SIZE(mx_endpoint_addr_t, 16, 8, 16);
SIZE(mx_segment_ptr_t, 8, 8, 4);
SIZE(mx_segment_t, 16, 8, 8);
SIZE(mx_param_t, 16, 8, 8);
SIZE(mx_status_t, 48, 8, 40);
SIZE(mx_mapper_state_t, 36, 4, 36);
SIZE(mx_endpt_handle_t, 4, 4, 4);
SIZE(mx_raw_status_t, 4, 4, 4);
SIZE(mx_raw_endpoint_t, 8, 8, 4);
SIZE(mx_error_handler_t, 8, 8, 4);
SIZE(mx_unexp_handler_t, 8, 8, 4);
SIZE(mx_matching_callback_t, 8, 8, 4);

SIZE(mx_return_t, 4, 4, 4);
SIZE(mx_status_code_t, 4, 4, 4);
SIZE(mx_param_key_t, 4, 4, 4);
SIZE(mx_get_info_key_t, 4, 4, 4);
SIZE(mx_unexp_handler_action_t, 4, 4, 4);
SIZE(mx_net_type_t, 4, 4, 4);
SIZE(mx_line_speed_t, 4, 4, 4);
SIZE(mx_host_type_t, 4, 4, 4);

AT(mx_segment_t, segment_ptr, 0, 0);
AT(mx_segment_t, segment_length, 8, 4);

AT(mx_param_t, key, 0, 0);
AT(mx_param_t, val, 8, 4);
AT(mx_param_t, val.error_handler, 8, 4);
AT(mx_param_t, val.unexp_queue_max, 8, 4);
AT(mx_param_t, val.context_id.bits, 8, 4);
AT(mx_param_t, val.context_id.shift, 9, 5);

AT(mx_status_t, code, 0, 0);
AT(mx_status_t, source, 8, 4);
AT(mx_status_t, match_info, 24, 20);
AT(mx_status_t, msg_length, 32, 28);
AT(mx_status_t, xfer_length, 36, 32);
AT(mx_status_t, context, 40, 36);

AT(mx_mapper_state_t, board_number, 0, 0);
AT(mx_mapper_state_t, mapper_mac, 4, 4);
AT(mx_mapper_state_t, iport, 10, 10);
AT(mx_mapper_state_t, map_version, 12, 12);
AT(mx_mapper_state_t, num_hosts, 16, 16);
AT(mx_mapper_state_t, network_configured, 20, 20);
AT(mx_mapper_state_t, routes_valid, 24, 24);
AT(mx_mapper_state_t, level, 28, 28);
AT(mx_mapper_state_t, flags, 32, 32);

SAYS(MX_API == 0x301);
SAYS(MX_MAX_STR_LEN == 128 && MX_MAX_HOSTNAME_LEN == 80 && MX_SIZEOF_ADDR == sizeof(mx_endpoint_addr_t));
SAYS(MX_ANY_NIC == 0xffffffff && MX_ANY_ENDPOINT == 0xffffffff && sizeof(MX_ANY_ENDPOINT) == 4);
SAYS(MX_INFINITE == 0 && MX_MAX_SEGMENTS == 256 && MX_CONTEXT_ID_BITS_MAX == 16);
SAYS(MX_MATCH_MASK_NONE == 0xffffffffffffffffULL && sizeof(MX_MATCH_MASK_NONE) == 8);
SAYS(MX_U32(0x123456789abcdef0ULL) == 0x12345678 && MX_L32(0x123456789abcdef0ULL) == 0x9abcdef0);
SAYS(MX_HAS_ICONNECT_V2 == 1 && MX_RAW_POLL_SUPPORTED == 1 && MX_SET_ROUTE_TAKES_MAGID == 1);
SAYS(MX_HAS_RAW_LINE_SPEED == 1 && MX_HAS_RAW_SET_NIC_REPLY_INFO == 1 && MX__INVALID_HANDLE == -1);
#ifndef MX_HAS_NET_TYPE
#error programs look for MX_HAS_NET_TYPE before they ask for the type of network
#endif

SAYS(MX_SUCCESS == 0 && MX_FAILURE == 2 && MX_ALREADY_INITIALIZED == 3 && MX_BAD_ENDPOINT == 9);
SAYS(MX_NO_RESOURCES == 15 && MX_BUSY == 20 && MX_BAD_PARAM_LIST == 24 && MX_TIMEOUT == 30);
SAYS(MX_BAD_INFO_LENGTH == 35 && MX_CANCEL_NOT_SUPPORTED == 40 && MX_NOT_SUPPORTED_WITH_CONTEXT_ID == 43);
SAYS(MX_STATUS_SUCCESS == 0 && MX_STATUS_TRUNCATED == 5 && MX_STATUS_BAD_SESSION == 10);
SAYS(MX_STATUS_NO_RESOURCES == 16);
SAYS(MX_PARAM_ERROR_HANDLER == 0 && MX_PARAM_UNEXP_QUEUE_MAX == 1 && MX_PARAM_CONTEXT_ID == 2);
SAYS(MX_NIC_COUNT == 1 && MX_NIC_IDS == 2 && MX_MAX_NATIVE_ENDPOINTS == 3 && MX_NATIVE_REQUESTS == 4);
SAYS(MX_COUNTERS_COUNT == 5 && MX_COUNTERS_LABELS == 6 && MX_COUNTERS_VALUES == 7 && MX_PRODUCT_CODE == 8);
SAYS(MX_PART_NUMBER == 9 && MX_SERIAL_NUMBER == 10 && MX_PORT_COUNT == 11 && MX_PIO_SEND_MAX == 12);
SAYS(MX_COPY_SEND_MAX == 13 && MX_NUMA_NODE == 14 && MX_NET_TYPE == 15 && MX_LINE_SPEED == 16);
SAYS(MX_RECV_CONTINUE == 0 && MX_RECV_FINISHED == 1 && MX_NET_MYRI == 0 && MX_NET_ETHER == 1);
SAYS(MX_SPEED_2G == 0 && MX_SPEED_10G == 1 && MX_SPEED_OPEN_MX == 2);
SAYS(MX_HOST_GM == 1 && MX_HOST_XM == 2 && MX_HOST_MX == 3 && MX_HOST_MXvM == 4);
SAYS(MX_RAW_NO_EVENT == 0 && MX_RAW_SEND_COMPLETE == 1 && MX_RAW_RECV_COMPLETE == 2);
SAYS(MX_DEAD_RECOVERABLE_SRAM_PARITY_ERROR == 10 && MX_DEAD_PCI_MASTER_ABORT == 17);

/* Every function has the arguments that programs give it: a pointer of that type can hold it. */
mx_return_t (*const isend)(mx_endpoint_t, mx_segment_t *, uint32_t, mx_endpoint_addr_t, uint64_t, void *,
                           mx_request_t *) = mx_isend;
mx_return_t (*const test)(mx_endpoint_t, mx_request_t *, mx_status_t *, uint32_t *) = mx_test;
mx_return_t (*const wait_any)(mx_endpoint_t, uint32_t, uint64_t, uint64_t, mx_status_t *, uint32_t *) = mx_wait_any;
mx_return_t (*const set_timeout)(mx_endpoint_t, mx_request_t, uint32_t) = mx_set_request_timeout;
mx_return_t (*const iconnect)(mx_endpoint_t, uint64_t, uint32_t, uint32_t, uint64_t, void *,
                              mx_request_t *) = mx_iconnect;
mx_return_t (*const disconnect)(mx_endpoint_t, mx_endpoint_addr_t) = mx_disconnect;
mx_return_t (*const mapper)(mx_endpt_handle_t, mx_mapper_state_t *) = mx__get_mapper_state;
