//! Load loops and machine limits for isthmus bench.
