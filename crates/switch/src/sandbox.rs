//! What the switch may still do once it serves guests: move bytes between descriptors that it is given.
//!
//! Strangers' descriptors, addresses and packets are parsed here, by code that is checked and fuzzed. Should it be taken
//! over all the same, it cannot start a program, open a file, reach a network, trace or signal a process, or gain a
//! privilege. What is left to it is the guests' own memory, and Unix sockets that listen on this node: the broker's
//! doors, and those of whoever believes the user it runs as. So let that be a user of its own where it can be.

use std::collections::BTreeMap;
use std::io;

use landlock::{ABI, Access, AccessFs, AccessNet, Ruleset, RulesetAttr, Scope};
use rustix::process::{Resource, Rlimit, setrlimit};
use rustix::thread::{CapabilitySet, CapabilitySets};
use seccompiler::{
    SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};

/// Calls that are allowed with any arguments.
const CALLS: &[i64] = &[
    // Waiting.
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_ppoll,
    libc::SYS_eventfd2,
    libc::SYS_futex,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_sched_yield,
    libc::SYS_restart_syscall,
    // Descriptors: guests' memory and interrupts, programs' lanes, sockets.
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_close,
    libc::SYS_dup,
    libc::SYS_dup3,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_fstatfs,
    libc::SYS_lseek,
    libc::SYS_ftruncate,
    libc::SYS_memfd_create,
    libc::SYS_accept4,
    libc::SYS_connect,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_shutdown,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    // Memory.
    libc::SYS_brk,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    // Its own state, signals and its end.
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_getrandom,
    libc::SYS_getcpu,
    libc::SYS_getrusage,
    libc::SYS_sched_getaffinity,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_rseq,
    libc::SYS_set_robust_list,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// Calls of old that some C libraries still make.
#[cfg(target_arch = "x86_64")]
const OLD_CALLS: &[i64] = &[libc::SYS_poll, libc::SYS_epoll_wait, libc::SYS_dup2];
#[cfg(not(target_arch = "x86_64"))]
const OLD_CALLS: &[i64] = &[];

fn failed(error: impl std::fmt::Display) -> io::Error {
    io::Error::other(error.to_string())
}

/// Confine this thread and all it starts, for good.
///
/// What this kernel does not have is left out: Landlock is there from Linux 5.13 if it was not turned off.
///
/// # Errors
/// The kernel refused. Part of it may be in force.
pub fn enter() -> io::Result<()> {
    // Looked up once, in a file, and known from then on.
    let _ = rustix::param::page_size();
    // Its memory holds what guests said to each other.
    setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })?;
    drop_capabilities()?;
    let everything = AccessFs::from_all(ABI::V6);
    Ruleset::default()
        .handle_access(everything)
        .and_then(|rules| rules.handle_access(AccessNet::from_all(ABI::V6)))
        .and_then(|rules| rules.scope(Scope::from_all(ABI::V6)))
        .and_then(|rules| rules.create())
        .and_then(landlock::RulesetCreated::restrict_self)
        .map_err(failed)?;
    let program: seccompiler::BpfProgram = filter().map_err(failed)?.try_into().map_err(failed)?;
    seccompiler::apply_filter_all_threads(&program).map_err(failed)
}

/// Of root's privileges one is left: the doors of other users' domains can be found.
fn drop_capabilities() -> io::Result<()> {
    let had = rustix::thread::capabilities(None)?;
    let kept = had.permitted & CapabilitySet::DAC_READ_SEARCH;
    rustix::thread::set_capabilities(
        None,
        CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() },
    )?;
    Ok(())
}

fn filter() -> Result<SeccompFilter, seccompiler::BackendError> {
    let when = |arg, op, value| {
        let condition = SeccompCondition::new(arg, SeccompCmpArgLen::Dword, op, value)?;
        Ok::<_, seccompiler::BackendError>(vec![SeccompRule::new(vec![condition])?])
    };
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        CALLS.iter().chain(OLD_CALLS).map(|call| (*call, Vec::new())).collect();
    // Nothing that can be executed.
    let executable = SeccompCmpOp::MaskedEq(libc::PROT_EXEC as u64);
    rules.insert(libc::SYS_mmap, when(2, executable.clone(), 0)?);
    rules.insert(libc::SYS_mprotect, when(2, executable, 0)?);
    // Nobody further away than this node.
    let unix = libc::AF_UNIX as u64;
    rules.insert(libc::SYS_socket, when(0, SeccompCmpOp::Eq, unix)?);
    rules.insert(libc::SYS_socketpair, when(0, SeccompCmpOp::Eq, unix)?);
    // No owner of signals, no leases.
    let commands = [
        libc::F_GETFD,
        libc::F_SETFD,
        libc::F_GETFL,
        libc::F_SETFL,
        libc::F_DUPFD_CLOEXEC,
        libc::F_ADD_SEALS,
        libc::F_GET_SEALS,
    ];
    let mut fcntl = Vec::new();
    for command in commands {
        fcntl.extend(when(1, SeccompCmpOp::Eq, command as u64)?);
    }
    rules.insert(libc::SYS_fcntl, fcntl);
    // A descriptor of a lane is opened again to be read by its peer. Nothing is written or made that way.
    let writing = (libc::O_ACCMODE | libc::O_CREAT | libc::O_TRUNC) as u64;
    rules.insert(libc::SYS_openat, when(2, SeccompCmpOp::MaskedEq(writing), libc::O_RDONLY as u64)?);
    #[cfg(target_arch = "x86_64")]
    rules.insert(libc::SYS_open, when(1, SeccompCmpOp::MaskedEq(writing), libc::O_RDONLY as u64)?);
    let arch = TargetArch::try_from(std::env::consts::ARCH)?;
    SeccompFilter::new(rules, SeccompAction::Errno(libc::EPERM as u32), SeccompAction::Allow, arch)
}
