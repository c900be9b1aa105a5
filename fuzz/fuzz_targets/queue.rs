//! A guest's memory of any content: whatever its transmit queue holds, chains end, stay in its memory, and what is
//! parsed as a packet is as long as it says.
#![no_main]

use std::os::fd::AsFd;

use isthmus_switch::memory::Memory;
use isthmus_switch::vring::{Chain, Vring, parse};
use isthmus_sys::memory;
use isthmus_wire::vhost_user::{Message, SET_MEM_TABLE, VringAddr};
use libfuzzer_sys::fuzz_target;

const SIZE: usize = 64 * 1024;
/// The guest's memory begins here, so that small numbers are outside of it.
const BASE: u64 = 0x1000;

fuzz_target!(|bytes: &[u8]| {
    let file = memory::create(c"fuzz", SIZE).expect("memory");
    let piece = [memory::Piece::new(bytes.as_ptr(), bytes.len().min(SIZE))];
    // SAFETY: the input is readable.
    unsafe { memory::write_at(file.as_fd(), &piece, 0).expect("written") };
    let mut table = vec![1, 0, 0, 0, 0, 0, 0, 0];
    for word in [BASE, SIZE as u64, BASE, 0] {
        table.extend(word.to_le_bytes());
    }
    let Ok(Message::SetMemTable(table)) = Message::decode(SET_MEM_TABLE, &table) else { unreachable!() };
    let guest = Memory::new(&table, vec![file]).expect("mapped");
    let event_idx = bytes.first().is_some_and(|byte| byte & 1 != 0);
    let mut ring = Vring::default();
    (ring.num, ring.enabled) = (64, true);
    ring.addr = Some(VringAddr { index: 1, descriptors: BASE + 144, available: BASE, used: BASE + 2048 });
    ring.kick = Some(memory::create(c"kick", 8).expect("a descriptor"));
    ring.call = Some(memory::create(c"call", 8).expect("a descriptor"));
    if !ring.start(&guest, event_idx).is_ok_and(|started| started) {
        return;
    }
    let mut chain = Chain::default();
    for _ in 0..256 {
        match ring.take(&guest, false, &mut chain) {
            Ok(true) => {}
            _ => break,
        }
        if let Ok((header, mut payload)) = parse(&chain) {
            assert!(payload.left() >= header.len as usize);
            let mut out = vec![0; header.len as usize];
            assert_eq!(payload.read(&mut out), out.len());
        }
        ring.keep(&guest, &chain);
        let _ = ring.tell(&guest);
    }
    ring.listen(&guest);
});
