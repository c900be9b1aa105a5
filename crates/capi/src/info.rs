//! What a program can ask about the library, its boards and its fabric.

use crate::backend::{Board, Chosen, Endpoint, Fault, Host, ReturnCode};
use crate::edge::{Bytes, Place, Text};
use crate::handlers::{answer, answer_for};
use crate::layout::{EndpointHandle, MapperState};
use crate::library::{self, Open};

/// `MX_MAX_STR_LEN`: bytes of a label, its NUL included.
const LABEL_LEN: usize = 128;
/// `MX_MAX_HOSTNAME_LEN`: bytes of a name, its NUL included.
const NAME_LEN: usize = 80;
/// `MX_NET_ETHER`
const NET_ETHER: u32 = 1;
/// How many requests there can be: as many as memory holds.
const NATIVE_REQUESTS: u32 = u32::MAX;
const PORTS: u32 = 1;
/// There is no product, part or serial number.
const NOT_AVAILABLE: &[u8] = b"not available\0";

#[unsafe(no_mangle)]
extern "C" fn mx_get_info(
    endpoint: EndpointHandle,
    key: u32,
    in_val: Bytes,
    in_len: u32,
    out_val: Bytes,
    out_len: u32,
) -> u32 {
    let question = |open: Option<&Open>| {
        let Some(look_up) = look_up(key) else {
            return Err(Fault::new(ReturnCode::BadInfoKey, format!("key {key} is not known")));
        };
        if out_val.is_null() {
            return Err(Fault::new(ReturnCode::BadInfoVal, "the answer would go to NULL"));
        }
        let host = library::host()?;
        let board = open.map_or_else(|| named_board(&in_val, in_len), |open| Ok(Some(open.endpoint.board())));
        let answer = look_up(&Question { host: &host, board })?;
        if (out_len as usize) < answer.len() {
            let what = format!("the answer is {} bytes, and there is room for {out_len}", answer.len());
            return Err(Fault::new(ReturnCode::BadInfoLength, what));
        }
        out_val.put(&answer);
        Ok(())
    };
    match endpoint {
        EndpointHandle(0) => answer("mx_get_info", || question(None)),
        endpoint => answer_for("mx_get_info", endpoint, |open| question(Some(open))),
    }
}

/// Programs give the number of a board in one byte, or in four. `Ok(None)`: not at all.
fn named_board(in_val: &Bytes, in_len: u32) -> Result<Option<u32>, ReturnCode> {
    match (in_val.is_null(), in_val.number(in_len)) {
        (true, _) => Ok(None),
        (false, Some(board)) => Ok(Some(board)),
        (false, None) => Err(ReturnCode::BadInfoLength),
    }
}

struct Question<'a> {
    host: &'a Chosen,
    board: Result<Option<u32>, ReturnCode>,
}

type Answer = Result<Vec<u8>, Fault>;

impl Question<'_> {
    /// The board asked about, which has to be named.
    fn board(&self) -> Result<u32, Fault> {
        self.board?.ok_or_else(|| {
            Fault::new(ReturnCode::BadInfoVal, "of which board? Give its number, or an endpoint")
        })
    }

    /// The board asked about, or the first: what most programs mean that name none.
    fn any_board(&self) -> Result<Board, Fault> {
        self.about(self.board.ok().flatten().unwrap_or(0))
    }

    fn about(&self, board: u32) -> Result<Board, Fault> {
        self.host.boards().into_iter().nth(board as usize).ok_or_else(|| unknown(board))
    }
}

fn unknown(board: u32) -> Fault {
    Fault::new(ReturnCode::BoardUnknown, format!("there is no board {board}"))
}

fn word(value: u32) -> Answer {
    Ok(value.to_ne_bytes().to_vec())
}

/// The function that answers a key.
fn look_up(key: u32) -> Option<fn(&Question<'_>) -> Answer> {
    Some(match key {
        1 => |question| word(question.host.boards().len() as u32),
        2 => |question| {
            let nics = question.host.boards().into_iter().map(|board| board.nic);
            Ok(nics.chain([0]).flat_map(u64::to_ne_bytes).collect())
        },
        3 => |_| word(Chosen::ENDPOINTS_MAX),
        4 => |_| word(NATIVE_REQUESTS),
        5 => |_| word(Chosen::COUNTERS.len() as u32),
        6 => |_| Ok(Chosen::COUNTERS.iter().flat_map(|label| label_bytes(label)).collect()),
        7 => |question| {
            let board = question.board()?;
            let values = question.host.counters(board).ok_or_else(|| unknown(board))?;
            Ok(values.into_iter().flat_map(u32::to_ne_bytes).collect())
        },
        8..=10 => |_| Ok(NOT_AVAILABLE.to_vec()),
        11 => |_| word(PORTS),
        12 => |_| word(Chosen::PIO_SEND_MAX),
        13 => |_| word(Chosen::COPY_SEND_MAX),
        14 => |question| word(question.about(question.board()?)?.numa_node),
        15 => |_| word(NET_ETHER),
        16 => |question| word(question.any_board()?.speed as u32),
        _ => return None,
    })
}

fn label_bytes(label: &str) -> [u8; LABEL_LEN] {
    std::array::from_fn(|at| label.as_bytes().get(at).copied().filter(|_| at < LABEL_LEN - 1).unwrap_or(0))
}

#[unsafe(no_mangle)]
extern "C" fn mx_hostname_to_nic_id(name: Text, nic_id: Place<u64>) -> u32 {
    answer("mx_hostname_to_nic_id", || {
        let host = library::host()?;
        let name = name.get().ok_or(ReturnCode::BadHostnameArgs)?;
        let unknown = || Fault::new(ReturnCode::HostNotFound, format!("no host is known as {name}"));
        nic_id.put(host.nic_named(name).ok_or_else(unknown)?);
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn mx_nic_id_to_hostname(nic_id: u64, name: Bytes) -> u32 {
    answer("mx_nic_id_to_hostname", || {
        let unknown = || Fault::new(ReturnCode::HostNotFound, format!("no NIC is known by {nic_id:#014x}"));
        let known = library::host()?.name_of(nic_id).ok_or_else(unknown)?;
        let mut bytes: Vec<u8> = known.bytes().take(NAME_LEN - 1).collect();
        bytes.push(0);
        name.put(&bytes);
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn mx_board_number_to_nic_id(board: u32, nic_id: Place<u64>) -> u32 {
    answer("mx_board_number_to_nic_id", || {
        let boards = library::host()?.boards();
        nic_id.put(boards.get(board as usize).ok_or_else(|| unknown(board))?.nic);
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn mx_nic_id_to_board_number(nic_id: u64, board: Place<u32>) -> u32 {
    answer("mx_nic_id_to_board_number", || {
        let boards = library::host()?.boards();
        let unknown =
            || Fault::new(ReturnCode::BoardUnknown, format!("no board here has the NIC id {nic_id:#014x}"));
        board.put(boards.iter().position(|board| board.nic == nic_id).ok_or_else(unknown)? as u32);
        Ok(())
    })
}

// A board's handle is its number.

#[unsafe(no_mangle)]
extern "C" fn mx_open_board(board: i32, handle: Place<i32>) -> u32 {
    answer("mx_open_board", || {
        let boards = library::host()?.boards();
        let is_there = usize::try_from(board).is_ok_and(|board| board < boards.len());
        is_there
            .then_some(())
            .ok_or_else(|| Fault::new(ReturnCode::BoardUnknown, format!("there is no board {board}")))?;
        handle.put(board);
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn mx__get_mapper_state(handle: i32, state: Place<MapperState>) -> u32 {
    answer("mx__get_mapper_state", || {
        let host = library::host()?;
        let unknown = || Fault::new(ReturnCode::BoardUnknown, format!("{handle} is no handle of a board"));
        let board = u32::try_from(handle).ok().ok_or_else(unknown)?;
        let fabric = host.fabric(board).ok_or_else(unknown)?;
        let [_, _, mapper_mac @ ..] = fabric.mapper_nic.to_be_bytes();
        state.put(MapperState {
            board_number: board,
            mapper_mac,
            iport: 0,
            map_version: fabric.map_version,
            num_hosts: fabric.hosts,
            network_configured: 1,
            routes_valid: 1,
            level: 0,
            flags: 0,
        });
        Ok(())
    })
}

/// Memory is about to go away: nothing is kept about memory here, so nothing is to be forgotten.
#[unsafe(no_mangle)]
extern "C" fn mx__regcache_clean(_start: Bytes, _len: usize) -> i32 {
    0
}
