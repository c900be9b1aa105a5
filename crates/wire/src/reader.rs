//! Takes bytes off the front, cannot panic, and knows where it is.

use core::fmt;

/// Why bytes were refused: which field of which format, where, and what was wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DecodeError {
    pub format: &'static str,
    pub field: &'static str,
    /// Offset of the field in the bytes given, in bytes.
    pub at: usize,
    pub problem: Problem,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Problem {
    Short { needs: usize, left: usize },
    Unknown(u64),
    TooBig { value: u64, limit: u64 },
    NotExpected { value: u64, expected: u64 },
    NotText,
    LeftOver(usize),
}

impl fmt::Display for DecodeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { format, field, at, problem } = self;
        write!(f, "{format}.{field} at byte {at}: ")?;
        match problem {
            Problem::Short { needs, left } => write!(f, "needs {needs} bytes, {left} left"),
            Problem::Unknown(value) => write!(f, "{value} is not known"),
            Problem::TooBig { value, limit } => write!(f, "{value} is more than {limit}"),
            Problem::NotExpected { value, expected } => write!(f, "{value} where {expected} must be"),
            Problem::NotText => f.write_str("is not UTF-8 text"),
            Problem::LeftOver(n) => write!(f, "{n} bytes too many"),
        }
    }
}

impl core::error::Error for DecodeError {}

/// A cursor over untrusted bytes.
pub struct Reader<'a> {
    format: &'static str,
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    #[must_use]
    pub fn new(format: &'static str, bytes: &'a [u8]) -> Self {
        Self { format, bytes, at: 0 }
    }

    /// An error about `field`, which begins `back` bytes before the cursor.
    #[must_use]
    pub fn error(&self, field: &'static str, back: usize, problem: Problem) -> DecodeError {
        DecodeError { format: self.format, field, at: self.at.saturating_sub(back), problem }
    }

    pub fn take(&mut self, field: &'static str, len: usize) -> Result<&'a [u8], DecodeError> {
        let Some((head, rest)) = self.bytes.split_at_checked(len) else {
            return Err(self.error(field, 0, Problem::Short { needs: len, left: self.bytes.len() }));
        };
        self.bytes = rest;
        self.at += len;
        Ok(head)
    }

    pub fn array<const N: usize>(&mut self, field: &'static str) -> Result<[u8; N], DecodeError> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(field, N)?);
        Ok(out)
    }

    pub fn u8(&mut self, field: &'static str) -> Result<u8, DecodeError> {
        Ok(u8::from_le_bytes(self.array(field)?))
    }

    pub fn u16(&mut self, field: &'static str) -> Result<u16, DecodeError> {
        Ok(u16::from_le_bytes(self.array(field)?))
    }

    pub fn u32(&mut self, field: &'static str) -> Result<u32, DecodeError> {
        Ok(u32::from_le_bytes(self.array(field)?))
    }

    pub fn u64(&mut self, field: &'static str) -> Result<u64, DecodeError> {
        Ok(u64::from_le_bytes(self.array(field)?))
    }

    /// Text with a 16-bit length in front, at most `limit` bytes.
    pub fn text(&mut self, field: &'static str, limit: usize) -> Result<&'a str, DecodeError> {
        let len = usize::from(self.u16(field)?);
        if len > limit {
            return Err(self.error(field, 2, Problem::TooBig { value: len as u64, limit: limit as u64 }));
        }
        let bytes = self.take(field, len)?;
        core::str::from_utf8(bytes).map_err(|_| self.error(field, len, Problem::NotText))
    }

    /// Nothing may follow.
    pub fn end(&self) -> Result<(), DecodeError> {
        match self.bytes.len() {
            0 => Ok(()),
            n => Err(self.error("end", 0, Problem::LeftOver(n))),
        }
    }
}
