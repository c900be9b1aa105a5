//! How patient an endpoint is, and how much it has under way.

/// Times, ns.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// A message that is not acknowledged goes out again: at first, and at most, this much later.
    pub resend_first: u64,
    pub resend_max: u64,
    /// A peer is given up that does not answer for so long, unless a request has a patience of its own. Waits are counted
    /// that are over.
    pub patience: u64,
    /// An acknowledgement waits so long for something to go with, or for so many messages.
    pub ack_delay: u64,
    pub ack_after: u16,
    /// Before the first block was measured; at least; at most.
    pub pull_first: u64,
    pub pull_least: u64,
    pub pull_most: u64,
    /// A sender of a large message that hears nothing asks whether the receiver is still there.
    pub keep_alive: u64,
    /// There was no room to send.
    pub no_room: u64,
}

impl Default for Timing {
    fn default() -> Self {
        const MS: u64 = 1_000_000;
        Self {
            resend_first: 10 * MS,
            resend_max: 500 * MS,
            patience: 500_000 * MS,
            ack_delay: 1000 * MS / 64,
            ack_after: 4,
            pull_first: 20 * MS,
            pull_least: MS,
            pull_most: 1000 * MS,
            keep_alive: 1000 * MS,
            no_room: MS / 10,
        }
    }
}

/// What may be on its way to one peer.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub messages: u8,
    pub bytes: u32,
    /// Blocks that are asked for ahead: of one pull, and of all of an endpoint. Each pull may always have one.
    pub blocks: u8,
    pub all_blocks: u8,
}

impl Default for Limits {
    fn default() -> Self {
        Self { messages: 128, bytes: 512 << 10, blocks: 8, all_blocks: 32 }
    }
}
