//! What a restore that was killed has left in directories: files under temporary names, and its directory of hard links.
//!
//! A restore holds a lock on its target, so whatever bears such a name in a directory that is being restored belongs to
//! nobody any more. Directories below that are locked are left alone: another restore has its target there.

use std::ffi::CStr;
use std::io;
use std::os::fd::OwnedFd;

use rustix::fs::{AtFlags, Dir, FlockOperation, Mode, OFlags};
use rustix::io::Errno;

/// What temporary names begin with.
pub(super) const PREFIX: &str = ".strand-";
/// What the name of the directory of hard links begins with.
pub(super) const LINKS_PREFIX: &str = ".strand-links-";

/// Locks a directory until the descriptor is closed. `None`: its file system has no locks.
pub(super) fn lock(directory: OwnedFd) -> io::Result<Option<OwnedFd>> {
    match rustix::fs::flock(&directory, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(directory)),
        Err(Errno::WOULDBLOCK) => Err(io::ErrorKind::WouldBlock.into()),
        Err(_) => Ok(None),
    }
}

/// Removes leftovers from a directory, which is open for reading. What cannot be removed stays: it is in nobody's way.
pub(super) fn sweep(directory: &OwnedFd) {
    let Ok(entries) = Dir::read_from(directory) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        if is_temporary(name.to_bytes()) {
            let _ = rustix::fs::unlinkat(directory, name, AtFlags::empty());
        } else if is_links(name.to_bytes()) {
            sweep_links(directory, name);
        }
    }
}

fn sweep_links(parent: &OwnedFd, name: &CStr) {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let Ok(links) = rustix::fs::openat(parent, name, flags, Mode::empty()) else { return };
    if let Ok(entries) = Dir::read_from(&links) {
        for entry in entries.flatten() {
            let _ = rustix::fs::unlinkat(&links, entry.file_name(), AtFlags::empty());
        }
    }
    let _ = rustix::fs::unlinkat(parent, name, AtFlags::REMOVEDIR);
}

/// `.strand-` 16 hexadecimal digits `-` number.
fn is_temporary(name: &[u8]) -> bool {
    let rest = name.strip_prefix(PREFIX.as_bytes()).and_then(|rest| rest.split_at_checked(16));
    rest.is_some_and(|(token, rest)| {
        is_token(token)
            && rest.strip_prefix(b"-").is_some_and(|number| !number.is_empty() && number.iter().all(u8::is_ascii_digit))
    })
}

fn is_links(name: &[u8]) -> bool {
    name.strip_prefix(LINKS_PREFIX.as_bytes()).is_some_and(|token| token.len() == 16 && is_token(token))
}

fn is_token(text: &[u8]) -> bool {
    text.iter().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_that_a_restore_makes_are_leftovers() {
        let token = "0123456789abcdef";
        assert!(is_temporary(format!(".strand-{token}-0").as_bytes()));
        assert!(is_links(format!(".strand-links-{token}").as_bytes()));
        for other in [".strand-", ".strand-notes", ".strandignore", ".strand-0123-1", "x", ".strand-links-x"] {
            assert!(!is_temporary(other.as_bytes()) && !is_links(other.as_bytes()), "{other}");
        }
        assert!(!is_temporary(format!(".strand-{token}-").as_bytes()));
        assert!(!is_temporary(format!(".strand-{token}-x").as_bytes()));
    }
}
