//! One directory of the directory registry, looked at again and again: a file's value is kept, and a
//! file is read anew only when it has changed.

use std::collections::{HashMap, HashSet};
use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use jiff::Timestamp;
use rustix::fs::{Mode, OFlags};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::RegistryError;
use super::store::failed;

/// No entry is longer; a file that is was not meant for us.
const FILE_LEN_MAX: u64 = 64 * 1024;
/// The key that the registry adds to each value.
pub(super) const EXPIRES: &str = "Expires";
/// A file that changed a shorter time ago may change once more at what is the same time for the file
/// system; FAT counts two seconds as one.
const SETTLED_SECONDS: i64 = 3;

/// The files of one directory, and what they hold. Names that begin with a dot are none of them.
#[derive(Debug)]
pub(super) struct Files<T> {
    directory: PathBuf,
    known: Mutex<HashMap<String, Known<T>>>,
}

/// A file's value and its end, or why it cannot be read.
pub(super) type Loaded<T> = Result<(T, Option<Timestamp>), String>;

/// A file as it was when last read.
#[derive(Debug)]
struct Known<T> {
    /// Of before it was read; none if it is to be read again in any case.
    stamp: Option<Stamp>,
    loaded: Loaded<T>,
}

/// What a file has that no other has, nor itself after a change: inode, length, and the time of its
/// last change in seconds and nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp(u64, u64, i64, i64);

impl<T: DeserializeOwned + Clone> Files<T> {
    pub(super) fn new(directory: PathBuf) -> Self {
        Self { directory, known: Mutex::default() }
    }

    pub(super) fn directory(&self) -> &Path {
        &self.directory
    }

    /// All files by their names, in no order.
    ///
    /// tmpfs leaves out of a long list a name that is renamed over meanwhile, and a lease being renewed
    /// must not look gone: what was there before is looked for, too.
    pub(super) fn look(&self) -> Result<Vec<(String, Loaded<T>)>, RegistryError> {
        let mut names = list(&self.directory)?;
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let mut former = std::mem::take(&mut *known);
        names.extend(former.keys().cloned());
        for name in names {
            if let Some(now) = look_again(&self.directory.join(&name), former.remove(&name)) {
                known.insert(name, now);
            }
        }
        Ok(known.iter().map(|(name, it)| (name.clone(), it.loaded.clone())).collect())
    }
}

/// The file as it is now; nothing if there is none.
fn look_again<T: DeserializeOwned>(path: &Path, known: Option<Known<T>>) -> Option<Known<T>> {
    let stamp = fs::metadata(path).map(|metadata| Stamp::of(&metadata)).ok();
    if let Some(known) = known
        && stamp.is_some()
        && known.stamp == stamp
    {
        return Some(known);
    }
    let loaded = load(path);
    // Removed while we looked: as if it had never been there.
    let is_there = loaded.is_ok() || path.exists();
    // What went wrong once, such as for want of memory, may not the next time.
    let stamp = stamp.filter(|stamp| stamp.is_settled() && loaded.is_ok());
    is_there.then_some(Known { stamp, loaded })
}

impl Stamp {
    fn of(metadata: &Metadata) -> Self {
        Self(metadata.ino(), metadata.len(), metadata.ctime(), metadata.ctime_nsec())
    }

    fn is_settled(self) -> bool {
        self.2.saturating_add(SETTLED_SECONDS) < Timestamp::now().as_second()
    }
}

/// The names of a directory's files.
fn list(directory: &Path) -> Result<HashSet<String>, RegistryError> {
    let mut names = HashSet::new();
    let not_listed = |source| failed("list", directory, source);
    for entry in fs::read_dir(directory).map_err(not_listed)? {
        let name = entry.map_err(not_listed)?.file_name().to_string_lossy().into_owned();
        if !name.starts_with('.') {
            names.insert(name);
        }
    }
    Ok(names)
}

/// A file's value and its end, or why it cannot be read.
pub(super) fn load<T: DeserializeOwned>(path: &Path) -> Loaded<T> {
    let text = read_limited(path).map_err(|error| error.to_string())?;
    let mut fields: Map<String, Value> =
        serde_json::from_str(&text).map_err(|error| format!("not a JSON object: {error}"))?;
    let expires = match fields.remove(EXPIRES) {
        None => None,
        Some(Value::String(text)) => {
            Some(text.parse().map_err(|_| format!("{EXPIRES} is no RFC 3339 time: {text:?}"))?)
        }
        Some(other) => return Err(format!("{EXPIRES} is no RFC 3339 time: {other}")),
    };
    let value = serde_json::from_value(Value::Object(fields)).map_err(|error| error.to_string())?;
    Ok((value, expires))
}

/// A whole file, unless it is longer than any entry.
pub(super) fn read_limited(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    // Without NONBLOCK, opening a FIFO waits for a writer: for ever, and every look with it.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::open(path, flags, Mode::empty())?);
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("not a file"));
    }
    file.take(FILE_LEN_MAX + 1).read_to_string(&mut text)?;
    if text.len() as u64 > FILE_LEN_MAX {
        return Err(io::Error::other(format!("longer than {FILE_LEN_MAX} bytes")));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use super::*;

    #[derive(Debug, Clone, PartialEq, Eq, serde::Deserialize)]
    struct Number {
        number: u32,
    }

    fn write(files: &Files<Number>, name: &str, number: u32) {
        fs::write(files.directory().join(name), format!(r#"{{"number":{number}}}"#)).unwrap();
    }

    fn look(files: &Files<Number>) -> Vec<(String, u32)> {
        let mut found: Vec<_> = files.look().unwrap();
        found.sort_unstable_by(|a, b| a.0.cmp(&b.0));
        found.into_iter().map(|(name, loaded)| (name, loaded.unwrap().0.number)).collect()
    }

    /// Over and over in place and in one instant, so that the length and often the time are the same.
    #[test]
    fn each_change_is_seen_at_once() {
        let directory = tempfile::tempdir().unwrap();
        let files = Files::new(directory.path().to_owned());
        for number in 100..600 {
            write(&files, "a", number);
            assert_eq!(look(&files), [("a".to_owned(), number)]);
        }
        fs::remove_file(directory.path().join("a")).unwrap();
        assert_eq!(look(&files), []);
    }

    #[test]
    fn what_has_not_changed_is_not_read_again() {
        let directory = tempfile::tempdir().unwrap();
        let files = Files::new(directory.path().to_owned());
        write(&files, "a", 1);
        write(&files, "b", 1);
        let is_known = || {
            look(&files);
            files.known.lock().unwrap().values().all(|known| known.stamp.is_some())
        };
        let deadline = SystemTime::now() + Duration::from_secs(30);
        while !is_known() {
            assert!(SystemTime::now() < deadline, "they never settle");
            std::thread::sleep(Duration::from_millis(50));
        }
        // As if it had been read otherwise: what comes of a look shows where it is from.
        for known in files.known.lock().unwrap().values_mut() {
            known.loaded = Ok((Number { number: 7 }, None));
        }
        write(&files, "b", 2);
        assert_eq!(look(&files), [("a".to_owned(), 7), ("b".to_owned(), 2)]);
    }
}
