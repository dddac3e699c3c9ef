//! Directories whose content is left out because of a file in them: `CACHEDIR.TAG` and others. The directory itself and
//! the marker are saved, so that a restored tree says the same.

use std::os::fd::AsFd;
use std::sync::Arc;

use rustix::fs::{AtFlags, OFlags};
use rustix::io::Errno;

use super::dir::{Dir, open_quietly};

/// The marker of cache directories, after the Cache Directory Tagging Specification.
const CACHE_TAG: &str = "CACHEDIR.TAG:Signature: 8a477f597d28d172789f06886806bc55";

/// A file name, and what the file must begin with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Marker {
    /// The name.
    pub name: Vec<u8>,
    header: Vec<u8>,
}

impl Marker {
    /// From `NAME[:HEADER]`; `None` if the name is no file name.
    pub fn parse(text: &str) -> Option<Self> {
        let (name, header) = text.split_once(':').unwrap_or((text, ""));
        let legal = !name.is_empty() && !name.contains('/') && name != "." && name != "..";
        legal.then(|| Self { name: name.into(), header: header.into() })
    }

    /// That of cache directories.
    pub fn of_caches() -> Option<Self> {
        Self::parse(CACHE_TAG)
    }

    /// Whether the directory has it. One that cannot be read does not count: rather save too much.
    pub fn is_in(&self, dir: &Arc<Dir>) -> bool {
        let Ok(fd) = dir.fd() else { return false };
        if self.header.is_empty() {
            return rustix::fs::statat(fd.as_fd(), self.name.as_slice(), AtFlags::SYMLINK_NOFOLLOW).is_ok();
        }
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let mut found = vec![0; self.header.len()];
        let read = open_quietly(fd.as_fd(), &self.name, flags).and_then(|file| read_start(file.as_fd(), &mut found));
        read.is_ok() && found == self.header
    }
}

fn read_start(file: impl AsFd, buffer: &mut [u8]) -> Result<(), Errno> {
    let mut done = 0;
    while let Some(rest) = buffer.get_mut(done..).filter(|rest| !rest.is_empty()) {
        match rustix::io::pread(&file, rest, done as u64) {
            Ok(0) => return Err(Errno::NODATA),
            Ok(read) => done += read,
            Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_marker_is_a_name_and_perhaps_a_header() {
        let marker = Marker::parse("TAG:a:b").unwrap();
        assert_eq!((marker.name.as_slice(), marker.header.as_slice()), (&b"TAG"[..], &b"a:b"[..]));
        assert!(Marker::parse("TAG").unwrap().header.is_empty());
        assert!(Marker::of_caches().is_some());
        for bad in ["", ":x", "a/b", "..", "."] {
            assert_eq!(Marker::parse(bad), None, "{bad}");
        }
    }
}
