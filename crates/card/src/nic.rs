//! Ethernet addresses as numbers.

pub use isthmus_wire::mxoe::{mac_of, nic_of_mac};

/// Can a station have this address? Not if it is nobody's, a group's, or too long.
pub(crate) fn is_station(nic: u64) -> bool {
    nic != 0 && nic >> 48 == 0 && nic >> 40 & 1 == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_a_number_and_back() {
        let mac = [2, 0, 0, 0, 1, 0xFE];
        assert_eq!(nic_of_mac(mac), 0x0200_0000_01FE);
        assert_eq!(mac_of(0x0200_0000_01FE), mac);
        assert!(is_station(nic_of_mac(mac)));
        for nic in [0, nic_of_mac([0xFF; 6]), nic_of_mac([1, 0, 0, 0, 0, 1]), 1 << 48] {
            assert!(!is_station(nic), "{nic:x}");
        }
    }
}
