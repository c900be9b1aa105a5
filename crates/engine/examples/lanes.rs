use isthmus_engine::lane::{Offer, with_dest, with_source};
use isthmus_ring::Seen;
use isthmus_wire::control::{Carrier, SocketKind};
use std::os::fd::AsFd;
use std::time::Instant;
fn pin(c: usize) {
    unsafe {
        let mut s: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(c, &mut s);
        libc::sched_setaffinity(0, size_of_val(&s), &s);
    }
}
fn main() {
    let sz: usize = std::env::args().nth(1).and_then(|s| s.parse().ok()).unwrap_or(524288);
    let carrier = if std::env::args().nth(2).is_some() { Carrier::Put } else { Carrier::Sealed };
    let large = std::env::args().nth(3).and_then(|s| s.parse().ok()).unwrap_or(2u32 << 20);
    let a = Offer::new(carrier, 32768, large).unwrap();
    let b = Offer::new(carrier, 32768, large).unwrap();
    let da = a.descriptors()[0].as_fd().try_clone_to_owned().unwrap();
    let db = b.descriptors()[0].as_fd().try_clone_to_owned().unwrap();
    let ea = a.join(&db, 32768, large, 7, SocketKind::Stream).unwrap();
    let eb = b.join(&da, 32768, large, 7, SocketKind::Stream).unwrap();
    let (mut tx, mut rx) = (ea.tx, eb.rx);
    let total: usize = 20_000_000_000;
    let h = std::thread::spawn(move || {
        pin(1);
        let mut buf = vec![0u8; sz];
        let mut got = 0usize;
        let mut t0 = Instant::now();
        while got < total {
            let mut off = 0;
            while off < sz {
                while !matches!(rx.look(), Ok(Seen::Data(_))) {
                    std::hint::spin_loop();
                }
                let (n, _, _) = with_dest(&mut buf[off..], |d| rx.read(d)).unwrap();
                off += n;
            }
            got += sz;
            if got % (5_000_000_000 / sz * sz) == 0 {
                println!("{:.1} GB/s", (5_000_000_000 / sz * sz) as f64 / t0.elapsed().as_secs_f64() / 1e9);
                t0 = Instant::now();
            }
        }
    });
    pin(0);
    let data = vec![1u8; sz];
    let mut sent = 0;
    while sent < total {
        with_source(&data, |s| {
            while s.left() > 0 {
                let w = tx.write_stream(s).unwrap();
                if !w.all {
                    std::hint::spin_loop();
                }
            }
        });
        sent += sz;
    }
    h.join().unwrap();
}
