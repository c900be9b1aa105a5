//! Names of domains and addresses as people write them.
//!
//! `worker-7:9000`, `12:9000` (a domain by number), `worker-7` where the port is given elsewhere.

use core::fmt;

/// Longest name of a domain or group, bytes: a DNS label.
pub const NAME_MAX: usize = 63;

/// A domain as somebody named it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Host<'a> {
    Name(&'a str),
    Number(u32),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AddressError {
    Empty,
    NameTooLong,
    NameCharacter(char),
    NameEdge,
    NoPort,
    BadPort,
    BadNumber,
}

impl fmt::Display for AddressError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty => f.write_str("the name is empty"),
            Self::NameTooLong => write!(f, "a name has at most {NAME_MAX} characters"),
            Self::NameCharacter(c) => {
                write!(f, "{c:?} is not allowed in a name: use a to z, 0 to 9, '-', '_' and '.'")
            }
            Self::NameEdge => f.write_str("a name begins with a letter and does not end in '-' or '.'"),
            Self::NoPort => f.write_str("no port: write domain:port"),
            Self::BadPort => f.write_str("the port is a number from 0 to 4294967295"),
            Self::BadNumber => f.write_str("the domain number is more than 4294967294"),
        }
    }
}

impl core::error::Error for AddressError {}

/// Check the name of a domain or a group.
///
/// # Errors
/// Says which rule the name breaks.
pub fn check_name(name: &str) -> Result<(), AddressError> {
    let first = name.chars().next().ok_or(AddressError::Empty)?;
    if name.len() > NAME_MAX {
        return Err(AddressError::NameTooLong);
    }
    let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '-' | '_' | '.');
    if let Some(c) = name.chars().find(|c| !allowed(*c)) {
        return Err(AddressError::NameCharacter(c));
    }
    if !first.is_ascii_lowercase() || name.ends_with(['-', '.']) {
        return Err(AddressError::NameEdge);
    }
    Ok(())
}

/// A domain by name or by number.
///
/// # Errors
/// Neither a good name nor a number.
pub fn parse_host(text: &str) -> Result<Host<'_>, AddressError> {
    if text.bytes().next().is_some_and(|b| b.is_ascii_digit()) {
        return match text.parse::<u32>() {
            Ok(number) if number != u32::MAX => Ok(Host::Number(number)),
            _ => Err(AddressError::BadNumber),
        };
    }
    check_name(text)?;
    Ok(Host::Name(text))
}

/// `host:port`.
///
/// # Errors
/// Says which part is wrong.
pub fn parse_address(text: &str) -> Result<(Host<'_>, u32), AddressError> {
    let (host, port) = text.rsplit_once(':').ok_or(AddressError::NoPort)?;
    if !port.bytes().all(|b| b.is_ascii_digit()) {
        return Err(AddressError::BadPort);
    }
    let port = port.parse().map_err(|_| AddressError::BadPort)?;
    Ok((parse_host(host)?, port))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::format;

    #[test]
    fn names_and_numbers() {
        assert_eq!(parse_address("worker-7:9000"), Ok((Host::Name("worker-7"), 9000)));
        assert_eq!(parse_address("12:0"), Ok((Host::Number(12), 0)));
        assert_eq!(parse_address("worker"), Err(AddressError::NoPort));
        assert_eq!(parse_address("worker:"), Err(AddressError::BadPort));
        assert_eq!(parse_address("worker:+1"), Err(AddressError::BadPort));
        assert_eq!(parse_address("worker:4294967296"), Err(AddressError::BadPort));
        assert_eq!(parse_address("4294967295:1"), Err(AddressError::BadNumber));
        assert_eq!(check_name(""), Err(AddressError::Empty));
        assert_eq!(check_name("A"), Err(AddressError::NameCharacter('A')));
        assert_eq!(check_name("-a"), Err(AddressError::NameEdge));
        assert_eq!(check_name("a."), Err(AddressError::NameEdge));
        assert_eq!(check_name("../x"), Err(AddressError::NameCharacter('/')));
    }

    proptest! {
        #[test]
        fn whatever_is_accepted_prints_back_to_itself(text in ".{0,80}") {
            if let Ok((host, port)) = parse_address(&text) {
                let back = match host {
                    Host::Name(name) => format!("{name}:{port}"),
                    Host::Number(number) => format!("{number}:{port}"),
                };
                prop_assert_eq!(parse_address(&back), Ok((host, port)));
            }
        }
    }
}
