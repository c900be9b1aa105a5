//! The inverse of the reader: puts fields at the end of a caller's buffer.

use core::fmt;

/// A field that does not fit: its name and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EncodeError {
    pub field: &'static str,
    pub reason: &'static str,
}

impl fmt::Display for EncodeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.field, self.reason)
    }
}

impl core::error::Error for EncodeError {}

/// A cursor over the caller's buffer.
pub struct Writer<'b> {
    out: &'b mut [u8],
    at: usize,
}

impl<'b> Writer<'b> {
    pub fn new(out: &'b mut [u8]) -> Self {
        Self { out, at: 0 }
    }

    /// Bytes written so far.
    #[must_use]
    pub fn len(&self) -> usize {
        self.at
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.at == 0
    }

    pub fn bytes(&mut self, field: &'static str, bytes: &[u8]) -> Result<(), EncodeError> {
        let end = self.at.saturating_add(bytes.len());
        let Some(room) = self.out.get_mut(self.at..end) else {
            return Err(EncodeError { field, reason: "the message does not fit its buffer" });
        };
        room.copy_from_slice(bytes);
        self.at = end;
        Ok(())
    }

    pub fn text(&mut self, field: &'static str, text: &str, limit: usize) -> Result<(), EncodeError> {
        let len = u16::try_from(text.len()).ok().filter(|n| usize::from(*n) <= limit);
        let Some(len) = len else {
            return Err(EncodeError { field, reason: "the text is too long" });
        };
        self.bytes(field, &len.to_le_bytes())?;
        self.bytes(field, text.as_bytes())
    }
}
