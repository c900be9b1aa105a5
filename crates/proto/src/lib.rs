//! The rules: pure state machines, no I/O, no clock.
