//! Stations of other nodes by name, as the card of this node knows them.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use isthmus_engine::node::Attachment;
use isthmus_engine::{Connection, How, Result, lane};
use isthmus_wire::card::{self, RECORD_MAX, Record};

use crate::card::dial;

/// Stations learn of each other within this, and of their names: a card hears of nobody while nobody here uses it.
const LEARNT: Duration = Duration::from_secs(3);
/// Between two questions.
const AGAIN: Duration = Duration::from_millis(50);
/// The card answers within this.
const ANSWER: Duration = Duration::from_secs(2);

/// The address of the station of this name, as in `node7:0`; waits up to 3 s for the card to learn of it. `None`: there
/// is none, or no card.
pub fn find_station(attachment: &Attachment, name: &str) -> Option<u64> {
    ask_until_found(attachment, &Record::Find { name }, |nic, _| Some(nic))
}

/// The name of the station with this address; as [`find_station`].
pub fn station_name(attachment: &Attachment, nic: u64) -> Option<String> {
    ask_until_found(attachment, &Record::FindNic { nic }, |_, name| {
        (!name.is_empty()).then(|| name.to_owned())
    })
}

fn ask_until_found<T>(
    attachment: &Attachment,
    question: &Record<'_>,
    pick: impl Fn(u64, &str) -> Option<T>,
) -> Option<T> {
    let until = Instant::now() + LEARNT;
    let card = dial(attachment, &within()).ok()?;
    let mut found = None;
    while found.is_none() {
        let answer = ask(&card, question).ok()?;
        if let Ok(Record::Found { found: true, nic, name }) = card::decode(&answer) {
            found = pick(nic, name);
        }
        if found.is_none() {
            if Instant::now() >= until {
                break;
            }
            thread::sleep(AGAIN);
        }
    }
    card.close();
    found
}

fn ask(card: &Arc<Connection>, question: &Record<'_>) -> Result<Vec<u8>> {
    let mut record = vec![0; RECORD_MAX];
    let len = card::encode(question, &mut record).unwrap_or(0);
    lane::with_source(&record[..len], |source| card.send_message(source, &within()))?;
    let (len, _) = lane::with_dest(&mut record, |dest| card.receive(dest, &within()))?;
    record.truncate(len);
    Ok(record)
}

fn within() -> How<'static> {
    How { deadline: Some(Instant::now() + ANSWER), ..How::default() }
}
