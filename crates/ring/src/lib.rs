//! Rings in memory that a stranger can write.
