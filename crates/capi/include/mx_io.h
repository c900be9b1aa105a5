/*
 * Handles of boards.
 */
#ifndef MX_IO_H
#define MX_IO_H

#include "myriexpress.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef int mx_endpt_handle_t;

#define MX__INVALID_HANDLE (-1)

/* A handle of a board, for mx__get_mapper_state. */
mx_return_t mx_open_board(int board_number, mx_endpt_handle_t *handle);

#ifdef __cplusplus
}
#endif

#endif
