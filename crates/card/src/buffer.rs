//! Where a record lies on its way from a lane to the wire.

/// Room for one record, and the record in it.
pub struct Buffer {
    bytes: Box<[u8]>,
    len: usize,
}

impl Buffer {
    #[must_use]
    pub fn new(capacity: usize) -> Self {
        Self { bytes: vec![0; capacity].into(), len: 0 }
    }

    #[must_use]
    pub fn capacity(&self) -> usize {
        self.bytes.len()
    }

    /// Put a record here: `fill` gets all the room, and says how much of it the record takes.
    pub fn fill<T>(&mut self, fill: impl FnOnce(&mut [u8]) -> (usize, T)) -> T {
        let (len, filled) = fill(&mut self.bytes);
        self.len = len.min(self.bytes.len());
        filled
    }

    #[must_use]
    pub fn record(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_default()
    }

    pub fn record_mut(&mut self) -> &mut [u8] {
        self.bytes.get_mut(..self.len).unwrap_or_default()
    }
}
