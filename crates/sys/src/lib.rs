//! Linux, one call per function.
