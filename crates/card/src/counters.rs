//! What the card counts.

use isthmus_wire::card::Counter;

macro_rules! counters {
    ($(#[$about:meta])* $name:ident { $($(#[$what:meta])* $field:ident),+ $(,)? }) => {
        $(#[$about])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct $name {
            $($(#[$what])* pub $field: u64),+
        }

        impl $name {
            /// Each by its name.
            pub fn lines(&self) -> impl Iterator<Item = Counter<'static>> + use<> {
                [$(Counter { name: stringify!($field), value: self.$field }),+].into_iter()
            }
        }
    };
}

counters! {
    /// Of one domain.
    DomainCounters {
        /// Frames that left, over the wire or to a domain of this card.
        sent_frames,
        sent_bytes,
        /// Frames put into a program's lane.
        received_frames,
        received_bytes,
        /// Records that are none.
        bad_records,
        /// Frames of programs that are none, or too long.
        bad_frames,
        /// Of types that programs do not send.
        not_for_programs,
        /// From another endpoint than the connection's, or before it was opened.
        wrong_endpoint,
        /// To an address that is not in the table of peers.
        unknown_peer,
        /// Stations that could not be added: too many by this domain, or in all.
        not_learnt,
        /// Found no room on the way to the wire.
        queue_full,
        /// Could not be sent: the interface is down, or the frame too long for it.
        not_sent,
        /// For a program that does not take them.
        lane_full,
        /// Arrived for an endpoint that nobody has open.
        no_endpoint,
        /// Dropped on purpose.
        faults,
    }
}

counters! {
    /// Of the card.
    Totals {
        received_frames,
        received_bytes,
        sent_frames,
        sent_bytes,
        /// For addresses that are not ours.
        foreign,
        /// No frames of MX, or of another dialect.
        bad_frames,
        /// From a station that is not in the table.
        unknown_peer,
        /// From an address of ours, which nobody else has.
        spoofed,
        /// With an index that the sender does not have here.
        stale_index,
        /// Stations that found no room in the table.
        peers_full,
        /// Refusals sent.
        refusals,
        /// Frames of the card's own that found no room.
        queue_full,
        not_sent,
        /// Frames that the kernel had no room for.
        ring_full,
        /// Addresses that the interface would not take.
        address_refused,
    }
}
