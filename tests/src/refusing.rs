//! Programs to whom the kernel says no, as the seccomp profile of a container runtime has it do.

use std::collections::BTreeMap;
use std::{panic, thread};

use anyhow::{Context, Result};
use nix::libc;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, apply_filter,
};

/// What the kernel refuses.
#[derive(Debug, Clone, Copy)]
pub enum Call {
    IoUringSetup,
    /// Receive buffers above net.core.rmem_max.
    RcvBufForce,
}

/// Does `work` on a thread to which the kernel refuses `call`, by EPERM, as it does to the programs
/// that are started there.
pub fn refusing<T: Send>(call: Call, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let filter = filter(call)?;
    let refused = || {
        apply_filter(&filter).context("cannot have calls refused")?;
        work()
    };
    thread::scope(|scope| scope.spawn(refused).join())
        .unwrap_or_else(|panicked| panic::resume_unwind(panicked))
}

fn filter(call: Call) -> Result<BpfProgram> {
    let rules = match call {
        Call::IoUringSetup => (libc::SYS_io_uring_setup, Vec::new()),
        Call::RcvBufForce => {
            let argument = |at, value: i32| {
                let (kind, value) = (SeccompCmpArgLen::Dword, u64::try_from(value)?);
                Ok::<_, anyhow::Error>(SeccompCondition::new(at, kind, SeccompCmpOp::Eq, value)?)
            };
            let option = [argument(1, libc::SOL_SOCKET)?, argument(2, libc::SO_RCVBUFFORCE)?];
            (libc::SYS_setsockopt, vec![SeccompRule::new(option.to_vec())?])
        }
    };
    let refuse = SeccompAction::Errno(libc::EPERM.cast_unsigned());
    let here = std::env::consts::ARCH.try_into()?;
    Ok(SeccompFilter::new(BTreeMap::from([rules]), SeccompAction::Allow, refuse, here)?
        .try_into()?)
}
