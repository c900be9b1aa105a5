//! Formats: bytes to types and back.
