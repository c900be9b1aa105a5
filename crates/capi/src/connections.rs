//! Connections, and what is known of addresses.

use crate::backend::{Address, Chosen, Endpoint, Host};
use crate::edge::Place;
use crate::handlers::{answer, answer_for};
use crate::layout::{EndpointHandle, RequestHandle};
use crate::requests::{hand_over, patience};

#[unsafe(no_mangle)]
extern "C" fn mx_connect(
    endpoint: EndpointHandle,
    nic_id: u64,
    endpoint_id: u32,
    key: u32,
    timeout: u32,
    address: Place<Address>,
) -> u32 {
    answer_for("mx_connect", endpoint, |open| {
        address.put(open.endpoint.connect(nic_id, endpoint_id, key, patience(timeout))?);
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn mx_iconnect(
    endpoint: EndpointHandle,
    nic_id: u64,
    endpoint_id: u32,
    key: u32,
    match_info: u64,
    context: usize,
    request: Place<RequestHandle>,
) -> u32 {
    answer_for("mx_iconnect", endpoint, |open| {
        let id = open.endpoint.iconnect(nic_id, endpoint_id, key, match_info, context)?;
        hand_over(open, id, &request)
    })
}

#[unsafe(no_mangle)]
extern "C" fn mx_disconnect(endpoint: EndpointHandle, address: Address) -> u32 {
    answer_for("mx_disconnect", endpoint, |open| open.endpoint.disconnect(address))
}

#[unsafe(no_mangle)]
extern "C" fn mx_get_endpoint_addr(endpoint: EndpointHandle, address: Place<Address>) -> u32 {
    answer_for("mx_get_endpoint_addr", endpoint, |open| {
        address.put(open.endpoint.address());
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn mx_decompose_endpoint_addr(
    address: Address,
    nic_id: Place<u64>,
    endpoint_id: Place<u32>,
) -> u32 {
    answer("mx_decompose_endpoint_addr", || {
        let decomposed = Chosen::decompose(address);
        nic_id.put(decomposed.nic);
        endpoint_id.put(decomposed.endpoint);
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn mx_decompose_endpoint_addr2(
    address: Address,
    nic_id: Place<u64>,
    endpoint_id: Place<u32>,
    session_id: Place<u32>,
) -> u32 {
    answer("mx_decompose_endpoint_addr2", || {
        let decomposed = Chosen::decompose(address);
        nic_id.put(decomposed.nic);
        endpoint_id.put(decomposed.endpoint);
        session_id.put(decomposed.session);
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn mx_set_endpoint_addr_context(address: Address, context: usize) -> u32 {
    answer("mx_set_endpoint_addr_context", || {
        Chosen::set_context_of(address, context);
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn mx_get_endpoint_addr_context(address: Address, context: Place<usize>) -> u32 {
    answer("mx_get_endpoint_addr_context", || {
        context.put(Chosen::context_of(address));
        Ok(())
    })
}
