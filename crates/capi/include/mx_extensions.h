/*
 * What MX gained after its first version: handlers for unexpected messages, connects that do not wait, contexts of
 * addresses, control over progression.
 */
#ifndef MX_EXTENSIONS_H
#define MX_EXTENSIONS_H

#include "myriexpress.h"

#ifdef __cplusplus
extern "C" {
#endif

/* mx_iconnect has the argument match_info. */
#define MX_HAS_ICONNECT_V2 1

/* --- Unexpected messages --------------------------------------------------------------------------------------- */

/* MX_RECV_FINISHED: the message is dealt with. MX_RECV_CONTINUE: it meets a receive, posted meanwhile or later. */
typedef enum { MX_RECV_CONTINUE = 0, MX_RECV_FINISHED = 1 } mx_unexp_handler_action_t;

/* Called for a message that no receive waits for. The data is there during the call only, and may be NULL. */
typedef mx_unexp_handler_action_t (*mx_unexp_handler_t)(void *context, mx_endpoint_addr_t source, uint64_t match_info,
                                                        uint32_t length, void *data_if_available);

/* The same, as it once was: told, and not asked. */
typedef void (*mx_matching_callback_t)(void *context, uint64_t match_info, int length);

/* NULL takes the handler away. */
mx_return_t mx_register_unexp_handler(mx_endpoint_t endpoint, mx_unexp_handler_t handler, void *context);
mx_return_t mx_register_unexp_callback(mx_endpoint_t endpoint, mx_matching_callback_t callback, void *context);

/* --- Connections and addresses --------------------------------------------------------------------------------- */

mx_return_t mx_iconnect(mx_endpoint_t endpoint, uint64_t nic_id, uint32_t endpoint_id, uint32_t key,
                        uint64_t match_info, void *context, mx_request_t *request);
mx_return_t mx_disconnect(mx_endpoint_t endpoint, mx_endpoint_addr_t address);
mx_return_t mx_decompose_endpoint_addr2(mx_endpoint_addr_t address, uint64_t *nic_id, uint32_t *endpoint_id,
                                        uint32_t *session_id);

/* A pointer that the program keeps with an address; NULL until it is set. */
mx_return_t mx_set_endpoint_addr_context(mx_endpoint_addr_t address, void *context);
mx_return_t mx_get_endpoint_addr_context(mx_endpoint_addr_t address, void **context);

/* --- Requests -------------------------------------------------------------------------------------------------- */

/* The request is done some day, and nobody is told. */
mx_return_t mx_forget(mx_endpoint_t endpoint, mx_request_t *request);

/* The request goes by value; NULL stands for all that are posted from now on. */
mx_return_t mx_set_request_timeout(mx_endpoint_t endpoint, mx_request_t request, uint32_t milliseconds);

/* --- Progression ----------------------------------------------------------------------------------------------- */

mx_return_t mx_progress(mx_endpoint_t endpoint);
mx_return_t mx_disable_progression(mx_endpoint_t endpoint);
mx_return_t mx_reenable_progression(mx_endpoint_t endpoint);

/* --- One-sided access: there is none, and these return an error ------------------------------------------------- */

mx_return_t mx_iput(mx_endpoint_t endpoint, void *local, uint32_t length, mx_endpoint_addr_t destination,
                    uint64_t remote_address, void *context, mx_request_t *request);
mx_return_t mx_iget(mx_endpoint_t endpoint, void *local, uint32_t length, mx_endpoint_addr_t destination,
                    uint64_t remote_address, void *context, mx_request_t *request);

#ifdef __cplusplus
}
#endif

#endif
