/*
 * Questions about a board that no endpoint is needed for.
 */
#ifndef MX__FOPS_H
#define MX__FOPS_H

#include "../mx_io.h"
#include "mx__driver_interface.h"

#ifdef __cplusplus
extern "C" {
#endif

mx_return_t mx__get_mapper_state(mx_endpt_handle_t handle, mx_mapper_state_t *state);

#ifdef __cplusplus
}
#endif

#endif
