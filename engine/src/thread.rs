//! The threads of an engine, from their start to their end.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crossbeam::channel::{self, Sender};
use rustix::event::{EventfdFlags, eventfd};

use crate::io::mmsg::Mmsg;
use crate::io::uring::Ring;
use crate::io::{Direction, Io};
use crate::tun_to_udp::TunToUdp;
use crate::udp_to_tun::UdpToTun;
use crate::worker::{self, Context, Lane, LaneOn};
use crate::{EngineError, IoKind, OnFailure, Tuning};

/// All of them. Dropped, they end.
#[derive(Debug)]
pub(crate) struct Threads {
    stop: Arc<AtomicBool>,
    running: Vec<Running>,
}

#[derive(Debug)]
struct Running {
    join: Option<JoinHandle<()>>,
    bell: File,
}

impl Threads {
    /// Starts those of each worker.
    ///
    /// # Errors
    /// One of them, or what it does its input and output by, could not be made. None goes on.
    pub(crate) fn start(
        io: IoKind,
        workers: &[[Context; 2]],
        tuning: &Tuning,
        on_failure: &OnFailure,
    ) -> Result<Self, EngineError> {
        let mut threads = Self { stop: Arc::default(), running: Vec::new() };
        let (started, outcomes) = channel::bounded(2 * workers.len());
        for (number, contexts) in workers.iter().enumerate() {
            for contexts in contexts.chunks(tuning.directions_a_thread()) {
                let job = Job {
                    contexts: contexts.to_vec(),
                    io,
                    busy_poll: tuning.busy_poll,
                    stop: Arc::clone(&threads.stop),
                    started: started.clone(),
                    on_failure: Arc::clone(on_failure),
                };
                threads.running.push(job.spawn(number)?);
            }
        }
        drop(started);
        for _ in &threads.running {
            let outcome = outcomes.recv().unwrap_or_else(|_| Err(io::Error::other("it panicked")));
            outcome.map_err(EngineError::Io)?;
        }
        Ok(threads)
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in &self.running {
            // An eventfd refuses only when its count is full, and then the thread is awake.
            let _ = (&thread.bell).write(&1u64.to_ne_bytes());
        }
        for thread in &mut self.running {
            if let Some(join) = thread.join.take() {
                // A panic has been reported by the thread itself: see `Job::run`.
                let _ = join.join();
            }
        }
    }
}

/// Everything that a thread needs to begin.
struct Job {
    contexts: Vec<Context>,
    io: IoKind,
    busy_poll: Duration,
    stop: Arc<AtomicBool>,
    started: Sender<io::Result<()>>,
    on_failure: OnFailure,
}

impl Job {
    fn spawn(self, number: usize) -> Result<Running, EngineError> {
        let bell =
            eventfd(0, EventfdFlags::CLOEXEC).map_err(|error| EngineError::Thread(error.into()))?;
        let thread_bell = bell.try_clone().map_err(EngineError::Thread)?;
        let name = match &self.contexts[..] {
            [one] => format!("{}-{number}", one.direction.name()),
            _ => format!("both_ways-{number}"),
        };
        let join = thread::Builder::new()
            .name(name)
            .spawn(move || self.run(&thread_bell))
            .map_err(EngineError::Thread)?;
        Ok(Running { join: Some(join), bell: bell.into() })
    }

    fn run(self, bell: &OwnedFd) {
        let name = thread::current().name().unwrap_or("engine").to_owned();
        let mut watch = DeathWatch { on_failure: self.on_failure, reason: None };
        // Made here, since only the thread that makes a ring may use it.
        let lanes = self.contexts.into_iter().map(|context| {
            let files = context.files(bell.as_fd());
            Ok(match self.io {
                IoKind::Uring => lane(Ring::new(context.direction, &files)?, context),
                IoKind::Mmsg => lane(Mmsg::new(context.direction, &files)?, context),
            })
        });
        let mut lanes = match lanes.collect::<io::Result<Vec<_>>>() {
            Ok(lanes) => lanes,
            Err(error) => return drop(self.started.send(Err(error))),
        };
        let started = self.started;
        drop(started.send(Ok(())));
        // Or who waits for all to start would not hear of one that ends before.
        drop(started);
        watch.reason = Some(format!("{name} panicked"));
        let ended = worker::run(&mut lanes, bell.as_fd(), &self.stop, self.busy_poll);
        watch.reason = ended.err().map(|error| format!("{name} stopped: {error}"));
    }
}

/// One direction of a worker, ready to carry packets.
fn lane(io: impl Io + 'static, context: Context) -> Box<dyn Lane> {
    match context.direction {
        Direction::TunToUdp => Box::new(LaneOn::new(io, TunToUdp::new(context.clone()), context)),
        Direction::UdpToTun => Box::new(LaneOn::new(io, UdpToTun::new(context.clone()), context)),
    }
}

/// Reports how a thread ended, a panic too, unless it was asked to.
struct DeathWatch {
    on_failure: OnFailure,
    reason: Option<String>,
}

impl Drop for DeathWatch {
    fn drop(&mut self) {
        if let Some(reason) = self.reason.take() {
            (self.on_failure)(reason);
        }
    }
}
