//! Socket addresses as programs pass them: `struct sockaddr_in` and `struct sockaddr_in6` (ip(7), ipv6(7)).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};

/// Longest address we look at, bytes.
pub const ADDRESS_MAX: usize = 28;
/// In the place of an address that nobody knows: one that is nobody's (RFC 7600).
pub const NOBODYS: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 0, 8));
const V4: usize = 16;
/// Without the scope, as some programs pass it.
const V6_SHORT: usize = 24;

/// The address in a program's memory. None: of another family, or too short.
#[must_use]
pub fn decode(bytes: &[u8]) -> Option<SocketAddr> {
    let family = i32::from(u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?));
    let port = u16::from_be_bytes(bytes.get(2..4)?.try_into().ok()?);
    match family {
        libc::AF_INET if bytes.len() >= V4 => {
            let address: [u8; 4] = bytes[4..8].try_into().ok()?;
            Some(SocketAddr::new(Ipv4Addr::from(address).into(), port))
        }
        libc::AF_INET6 if bytes.len() >= V6_SHORT => {
            let address: [u8; 16] = bytes[8..24].try_into().ok()?;
            let flow = u32::from_be_bytes(bytes[4..8].try_into().ok()?);
            let scope = bytes.get(24..28).and_then(|b| b.try_into().ok()).map_or(0, u32::from_ne_bytes);
            Some(SocketAddrV6::new(Ipv6Addr::from(address), port, flow, scope).into())
        }
        _ => None,
    }
}

/// The address for a program whose socket is of IPv6 or not; an address of IPv4 is mapped for one of IPv6.
#[must_use]
pub fn encode(address: SocketAddr, v6: bool) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(ADDRESS_MAX);
    let mut put = |part: &[u8]| bytes.extend_from_slice(part);
    match (address, v6) {
        (SocketAddr::V4(address), false) => {
            put(&(libc::AF_INET as u16).to_ne_bytes());
            put(&address.port().to_be_bytes());
            put(&address.ip().octets());
            put(&[0; 8]);
        }
        (address, _) => {
            let (ip, flow, scope) = match address {
                SocketAddr::V4(address) => (address.ip().to_ipv6_mapped(), 0, 0),
                SocketAddr::V6(address) => (*address.ip(), address.flowinfo(), address.scope_id()),
            };
            put(&(libc::AF_INET6 as u16).to_ne_bytes());
            put(&address.port().to_be_bytes());
            put(&flow.to_be_bytes());
            put(&ip.octets());
            put(&scope.to_ne_bytes());
        }
    }
    bytes
}

/// Without the wrapping of IPv4 in IPv6.
#[must_use]
pub fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// Could this be another domain of the node? Loopback, multicast and the like never are.
#[must_use]
pub fn may_be_a_neighbour(address: SocketAddr) -> bool {
    let ip = address.ip().to_canonical();
    let special = match ip {
        IpAddr::V4(ip) => ip.is_broadcast(),
        // Of one link alone: the same address may be on several.
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    };
    address.port() != 0 && !(ip.is_loopback() || ip.is_unspecified() || ip.is_multicast() || special)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_bytes_are_the_kernels() {
        let bytes = encode(SocketAddr::from(([10, 0, 0, 7], 6379)), false);
        assert_eq!(bytes, [2, 0, 0x18, 0xeb, 10, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0, 0]);
        let bytes = encode(SocketAddr::from(([10, 0, 0, 7], 6379)), true);
        assert_eq!(bytes.len(), ADDRESS_MAX);
        assert_eq!(bytes[..8], [10, 0, 0x18, 0xeb, 0, 0, 0, 0]);
        assert_eq!(bytes[8..24], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 0, 0, 7]);
    }

    #[test]
    fn what_cannot_be_a_neighbour() {
        for (text, may) in [
            ("10.0.0.7:80", true),
            ("10.0.0.7:0", false),
            ("127.0.0.1:80", false),
            ("[::ffff:127.0.0.1]:80", false),
            ("0.0.0.0:80", false),
            ("224.0.0.1:80", false),
            ("[fe80::1]:80", false),
            ("[fd00::7]:80", true),
        ] {
            assert_eq!(may_be_a_neighbour(text.parse().expect("an address")), may, "{text}");
        }
    }

    proptest! {
        #[test]
        fn garbage_is_no_address_or_goes_back_to_itself(bytes in prop::collection::vec(any::<u8>(), 0..40)) {
            if let Some(address) = decode(&bytes) {
                let again = encode(address, address.is_ipv6());
                prop_assert_eq!(decode(&again), Some(address));
            }
        }

        #[test]
        fn addresses_survive(ip: std::net::IpAddr, port: u16, v6: bool) {
            let address = SocketAddr::new(ip, port);
            let back = decode(&encode(address, v6)).expect("an address");
            prop_assert_eq!(canonical(back), canonical(address));
        }
    }
}
