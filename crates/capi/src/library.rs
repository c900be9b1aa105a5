//! What there is one of in a process: whether it is initialised, and the table of open endpoints.
//!
//! Handles are numbers made to look like pointers, so that one that is no longer good is noticed. An endpoint's has its
//! place in the table, counted from 1, in the low 16 bits, and above them how often the place was used. A request's has
//! the endpoint's place in the high 16 bits, and below them its number there: `mx_context` is given nothing else.

use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::backend::{Chosen, Fault, Host, OPEN_MAX, REQUEST_BITS, RequestId, ReturnCode};
use crate::handlers::ErrorHandler;
use crate::layout::{EndpointHandle, RequestHandle};

const PLACE_BITS: u32 = 16;
const PLACE_MASK: usize = (1 << PLACE_BITS) - 1;

pub type Endpoint = <Chosen as Host>::Endpoint;

/// An endpoint that a program has opened.
pub struct Open {
    pub endpoint: Endpoint,
    pub handler: Option<ErrorHandler>,
    /// In the table, from 1.
    place: usize,
}

#[derive(Default)]
struct Entry {
    used: usize,
    open: Option<Arc<Open>>,
}

static HOST: RwLock<Option<Arc<Chosen>>> = RwLock::new(None);
static TABLE: RwLock<Vec<Entry>> = RwLock::new(Vec::new());

fn read<T>(lock: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

fn write<T>(lock: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}

/// What the library was initialised with.
///
/// # Errors
/// `NotInitialized`.
pub fn host() -> Result<Arc<Chosen>, Fault> {
    read(&HOST).clone().ok_or_else(|| ReturnCode::NotInitialized.into())
}

/// Begin. `check` is what has to be right once it is known that this is the first time.
pub fn start(check: impl FnOnce() -> Result<(), Fault>) -> Result<(), Fault> {
    let mut host = write(&HOST);
    if host.is_some() {
        return Err(ReturnCode::AlreadyInitialized.into());
    }
    check()?;
    *host = Some(Arc::new(Chosen::start()?));
    Ok(())
}

/// End. Endpoints stay open.
pub fn stop() {
    *write(&HOST) = None;
}

pub fn add(endpoint: Endpoint, handler: Option<ErrorHandler>) -> Result<EndpointHandle, Fault> {
    let mut table = write(&TABLE);
    let index = table.iter().position(|place| place.open.is_none()).unwrap_or(table.len());
    if index == OPEN_MAX {
        return Err(Fault::new(ReturnCode::Busy, format!("{OPEN_MAX} endpoints are open")));
    }
    if index == table.len() {
        table.push(Entry::default());
    }
    let kept = &mut table[index];
    kept.used = kept.used % (usize::MAX >> PLACE_BITS) + 1;
    kept.open = Some(Arc::new(Open { endpoint, handler, place: index + 1 }));
    Ok(EndpointHandle(kept.used << PLACE_BITS | (index + 1)))
}

pub fn find(handle: EndpointHandle) -> Option<Arc<Open>> {
    let index = (handle.0 & PLACE_MASK).checked_sub(1)?;
    let table = read(&TABLE);
    let place = table.get(index)?;
    (place.used == handle.0 >> PLACE_BITS).then(|| place.open.clone())?
}

/// It is closed. Nothing happens to a handle that is no longer good.
pub fn remove(handle: EndpointHandle) {
    let Some(index) = (handle.0 & PLACE_MASK).checked_sub(1) else { return };
    if let Some(place) = write(&TABLE).get_mut(index).filter(|place| place.used == handle.0 >> PLACE_BITS) {
        place.open = None;
    }
}

/// The endpoint that a request belongs to.
///
/// # Errors
/// `BadRequest`: none that is open.
pub fn owner(handle: RequestHandle) -> Result<Arc<Open>, Fault> {
    let index = (handle.0 >> REQUEST_BITS).checked_sub(1);
    let open = index.and_then(|index| read(&TABLE).get(index)?.open.clone());
    open.ok_or_else(|| ReturnCode::BadRequest.into())
}

impl Open {
    pub fn handle_of(&self, id: RequestId) -> RequestHandle {
        RequestHandle(self.place << REQUEST_BITS | id.0 as usize)
    }

    /// # Errors
    /// `BadRequest`: NULL, or of another endpoint.
    pub fn request(&self, handle: Option<RequestHandle>) -> Result<RequestId, Fault> {
        let number = handle.filter(|handle| handle.0 != 0);
        let Some(RequestHandle(number)) = number else {
            return Err(Fault::new(ReturnCode::BadRequest, "NULL is no request"));
        };
        if number >> REQUEST_BITS != self.place {
            return Err(Fault::new(ReturnCode::BadRequest, "the request is not one of this endpoint"));
        }
        Ok(id_of(RequestHandle(number)))
    }
}

/// The number of a request at its endpoint.
pub fn id_of(handle: RequestHandle) -> RequestId {
    RequestId(handle.0 as u64 & ((1 << REQUEST_BITS) - 1))
}
