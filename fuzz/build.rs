//! Seeds: the golden bytes of `vectors/`, where cargo-fuzz looks for a target's corpus.

use std::fs;
use std::path::Path;

fn main() {
    println!("cargo:rerun-if-changed=../vectors");
    for entry in fs::read_dir("../vectors").expect("../vectors") {
        let path = entry.expect("an entry").path();
        if path.extension().is_none_or(|extension| extension != "txt") {
            continue;
        }
        let format = path.file_stem().expect("a name").to_string_lossy().into_owned();
        if !Path::new("fuzz_targets").join(&format).with_extension("rs").exists() {
            continue;
        }
        let corpus = Path::new("corpus").join(&format);
        fs::create_dir_all(&corpus).expect("corpus");
        let text = fs::read_to_string(&path).expect("vectors");
        let lines = text.lines().filter(|line| !line.starts_with('#') && !line.is_empty());
        for (number, line) in lines.enumerate() {
            let seed = line.rsplit(' ').next().and_then(bytes).unwrap_or_else(|| line.into());
            fs::write(corpus.join(format!("vector-{number}")), seed).expect("a seed");
        }
    }
}

/// The bytes that a golden line gives in hex.
fn bytes(hex: &str) -> Option<Vec<u8>> {
    let digits = hex.len() % 2 == 0 && hex.bytes().all(|b| b.is_ascii_hexdigit());
    digits.then(|| {
        (0..hex.len() / 2).filter_map(|i| u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).ok()).collect()
    })
}
