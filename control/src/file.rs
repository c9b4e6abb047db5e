//! Files that appear whole or not at all: neither a reader nor a power cut finds half of one.

use std::fs::{self, File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;

use tempfile::NamedTempFile;

/// For the owner alone.
pub const PRIVATE: u32 = 0o600;
/// For everybody to read.
pub const PUBLIC: u32 = 0o644;

/// For everybody to enter.
const OPEN: u32 = 0o755;

/// Writes a file with these permission bits, in place of the one that was there. Its directory is
/// made if missing. Names that begin with `.new-` are temporary.
///
/// # Errors
/// The file system refused; the old file, if any, is as it was.
pub fn replace(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let (file, dir) = temporary(path, bytes, mode)?;
    file.persist(path)?;
    dir.sync_all()
}

/// As [`replace`], but only where there is nothing, and says whether it wrote.
///
/// # Errors
/// The file system refused.
pub fn create(path: &Path, bytes: &[u8], mode: u32) -> io::Result<bool> {
    let (file, dir) = temporary(path, bytes, mode)?;
    match file.persist_noclobber(path) {
        Ok(_) => dir.sync_all().map(|()| true),
        Err(error) if error.error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(error) => Err(error.error),
    }
}

/// Opens a file to read and write, as it is or empty, and for nobody else: whoever may read a file may
/// lock it, too (flock(2)).
///
/// # Errors
/// The file system refused.
pub fn open_private(path: &Path) -> io::Result<File> {
    let mut options = File::options();
    let file =
        options.read(true).write(true).create(true).truncate(false).mode(PRIVATE).open(path)?;
    file.set_permissions(Permissions::from_mode(PRIVATE))?;
    Ok(file)
}

/// A synced file beside `path`, and their directory.
fn temporary(path: &Path, bytes: &[u8], mode: u32) -> io::Result<(NamedTempFile, File)> {
    let dir = match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    make_dir(dir, mode)?;
    let mut file = tempfile::Builder::new().prefix(".new-").tempfile_in(dir)?;
    file.write_all(bytes)?;
    file.as_file().set_permissions(Permissions::from_mode(mode))?;
    file.as_file().sync_all()?;
    Ok((file, File::open(dir)?))
}

/// Makes what is missing of a directory. Whoever may read a file has to get to it, whatever the umask is.
fn make_dir(dir: &Path, mode: u32) -> io::Result<()> {
    let Some(parent) = dir.parent().filter(|_| mode == PUBLIC && !dir.is_dir()) else {
        return fs::create_dir_all(dir);
    };
    make_dir(parent, mode)?;
    fs::create_dir_all(dir)?;
    fs::set_permissions(dir, Permissions::from_mode(OPEN))
}
