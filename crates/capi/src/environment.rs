//! Settings from the environment: by the names of MX, and by those of Open-MX, which come first.

use std::env;

use isthmus_mx::Timing;

/// What is no number is not a setting.
fn read(name: &str) -> Option<u64> {
    env::var(name).ok()?.trim().parse().ok()
}

fn read_mx(name: &str) -> Option<u64> {
    if read("OMX_IGNORE_MX_ENV") == Some(1) { None } else { read(name) }
}

/// The number that a setting has been given.
fn number(mx_name: &str, omx_name: &str) -> Option<u64> {
    read(omx_name).or_else(|| read_mx(mx_name))
}

/// Whether the handler that a program starts with ends it. Unless told otherwise, it does.
pub fn errors_are_fatal() -> bool {
    number("MX_ERRORS_ARE_FATAL", "OMX_FATAL_ERRORS") != Some(0)
}

/// Peers of other nodes are none of this program's business.
pub fn stays_on_node() -> bool {
    read_mx("MX_NO_MYRINET").is_some_and(|set| set != 0)
}

/// How many sends end before a peer of another node has acknowledged them.
pub fn early_sends_max() -> Option<usize> {
    // MX has it on or off: any number but 0 is more than enough, or what Open-MX means by it.
    number("MX_ZOMBIE_SEND", "OMX_ZOMBIE_SEND")
        .filter(|most| *most != 1)
        .and_then(|most| most.try_into().ok())
}

/// How the side of other nodes takes its time.
pub fn timing() -> Timing {
    let usual = Timing::default();
    // Of stations that send again every half second.
    let resends =
        number("MX_MAX_RETRIES", "OMX_RESENDS_MAX").map(|most| most.saturating_mul(usual.resend_max));
    let ack_after = number("MX_IMM_ACK", "OMX_NOTACKED_MAX").and_then(|most| most.try_into().ok());
    Timing {
        patience: resends.unwrap_or(usual.patience),
        ack_after: ack_after.unwrap_or(usual.ack_after),
        ..usual
    }
}

/// Whether calls that wait never sleep.
pub fn spins() -> bool {
    read("OMX_WAITSPIN").is_some_and(|set| set != 0)
}
