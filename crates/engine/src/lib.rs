//! Turns the crank: lanes, connections, the attachment to a broker.
