//! The kernel's notices about what changes in directories (inotify(7)).

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use futures_util::{FutureExt, StreamExt};
use inotify::{EventMask, EventOwned, EventStream, Inotify, WatchMask};

/// Entries that come, change or go, and the directory that goes itself. Not that they are opened:
/// whoever looks at what has changed would wake himself up.
const WATCHED: WatchMask = WatchMask::CREATE
    .union(WatchMask::CLOSE_WRITE)
    .union(WatchMask::MOVE)
    .union(WatchMask::DELETE)
    .union(WatchMask::DELETE_SELF)
    .union(WatchMask::MOVE_SELF)
    .union(WatchMask::ONLYDIR);
/// What says that a path may name another directory now, or none. The inode does not tell: the next
/// directory may get the same one.
const GONE: EventMask =
    EventMask::DELETE_SELF.union(EventMask::MOVE_SELF).union(EventMask::IGNORED);

/// Notices about a few directories.
pub(super) struct Notices {
    directories: Vec<PathBuf>,
    /// `None` where the kernel gives no notices: a regular look must stand in.
    events: Option<EventStream<[u8; 4096]>>,
    /// The directories that notices come from, by inode; `None` for one that is not there.
    followed: Vec<Option<u64>>,
}

impl Notices {
    pub(super) fn new(directories: Vec<PathBuf>) -> Self {
        Self { directories, events: None, followed: Vec::new() }
    }

    /// Makes sure that notices come from the directories that are there now. What has happened
    /// before is for the caller to look at.
    ///
    /// # Errors
    /// The kernel gives no (more) notices, which usually means `fs.inotify.max_user_instances`.
    pub(super) fn follow(&mut self) -> io::Result<()> {
        let inode = |path: &PathBuf| fs::metadata(path).ok().map(|found| found.ino());
        let inodes: Vec<Option<u64>> = self.directories.iter().map(inode).collect();
        if inodes == self.followed {
            return Ok(());
        }
        self.events = None;
        // Remembered before the kernel may refuse, so that it is asked, and told of, only once.
        self.followed.clone_from(&inodes);
        let inotify = Inotify::init()?;
        for (directory, inode) in self.directories.iter().zip(inodes) {
            match inotify.watches().add(directory, WATCHED) {
                Err(error) if inode.is_some() => return Err(error),
                _ => {}
            }
        }
        self.events = Some(inotify.into_event_stream([0; 4096])?);
        Ok(())
    }

    /// Returns when there was a notice; never where there are none. Cancel safe.
    pub(super) async fn changed(&mut self) {
        let Some(events) = &mut self.events else {
            return std::future::pending().await;
        };
        let event = events.next().await;
        self.take(event);
    }

    /// Forgets notices that a look from now on answers.
    pub(super) fn drain(&mut self) {
        while let Some(event) = self.events.as_mut().and_then(|it| it.next().now_or_never()) {
            self.take(event);
        }
    }

    fn take(&mut self, event: Option<io::Result<EventOwned>>) {
        match event {
            Some(Ok(event)) if event.mask.intersects(GONE) => self.followed.clear(),
            Some(Ok(_)) => {}
            Some(Err(_)) | None => self.events = None,
        }
    }
}
