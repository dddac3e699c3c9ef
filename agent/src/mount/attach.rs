//! Attaching to the kernel, and detaching: directly as root, through the helper `fusermount3` otherwise.
//!
//! Not left to `fuser`: version 0.18 unmounts once more after somebody else has unmounted, and so would take away what
//! was mounted there before.

use std::ffi::CString;
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::fs::{Mode, OFlags};
use rustix::io::{Errno, FdFlags};
use rustix::mount::{MountFlags, UnmountFlags};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};

use super::MountSettings;

const DEVICE: &str = "/dev/fuse";
/// What mount tables say is mounted.
const SOURCE: &str = "strand";
const HELPER: &str = "fusermount3";
/// Where the helper finds the socket on which it hands over the connection.
const HELPER_SOCKET: &str = "_FUSE_COMMFD";

/// Mounts on `mountpoint`, an absolute path of a directory; gives the connection to the kernel.
pub(super) fn attach(mountpoint: &Path, settings: &MountSettings) -> io::Result<OwnedFd> {
    match directly(mountpoint, settings) {
        // Users may mount through the helper only.
        Err(Errno::PERM | Errno::ACCESS) if !rustix::process::geteuid().is_root() => by_helper(mountpoint, settings),
        attached => Ok(attached?),
    }
}

/// The options that both ways take in the same words.
fn common_options(settings: &MountSettings) -> String {
    let mut options = String::new();
    if settings.allow_other {
        options += ",allow_other";
    }
    if settings.permissions {
        options += ",default_permissions";
    }
    options
}

fn directly(mountpoint: &Path, settings: &MountSettings) -> Result<OwnedFd, Errno> {
    let device = rustix::fs::open(DEVICE, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    let (user, group) = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
    let number = device.as_raw_fd();
    let options = format!("fd={number},rootmode=40000,user_id={user},group_id={group}{}", common_options(settings));
    let options = CString::new(options).map_err(|_| Errno::INVAL)?;
    // Devices and set-id bits have no effect here, whatever the snapshots hold.
    let flags = MountFlags::RDONLY | MountFlags::NODEV | MountFlags::NOSUID | MountFlags::NOATIME;
    rustix::mount::mount(SOURCE, mountpoint, "fuse.strand", flags, options.as_c_str())?;
    Ok(device)
}

fn by_helper(mountpoint: &Path, settings: &MountSettings) -> io::Result<OwnedFd> {
    let (ours, theirs) = UnixStream::pair()?;
    rustix::io::fcntl_setfd(&theirs, FdFlags::empty())?;
    let options = format!("ro,nodev,nosuid,noatime,fsname={SOURCE},subtype={SOURCE}{}", common_options(settings));
    let helper = Command::new(HELPER)
        .args(["-o", &options, "--"])
        .arg(mountpoint)
        .env(HELPER_SOCKET, theirs.as_raw_fd().to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn();
    drop(theirs);
    // It hands over the connection, or ends with a message.
    let output = helper.and_then(std::process::Child::wait_with_output);
    let output = output.map_err(|error| io::Error::new(error.kind(), format!("{HELPER}: {error}")))?;
    if !output.status.success() {
        return Err(io::Error::other(String::from_utf8_lossy(&output.stderr).trim().to_owned()));
    }
    received(&ours)
}

/// The descriptor that waits on the socket.
fn received(socket: &UnixStream) -> io::Result<OwnedFd> {
    let mut byte = [0];
    let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut messages = RecvAncillaryBuffer::new(&mut room);
    rustix::net::recvmsg(socket, &mut [IoSliceMut::new(&mut byte)], &mut messages, RecvFlags::CMSG_CLOEXEC)?;
    let descriptors = messages.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
        _ => None,
    });
    descriptors.flatten().next().ok_or_else(|| io::Error::other(format!("{HELPER} handed over nothing")))
}

/// Unmounts. `force`: although it is in use; whoever uses it gets errors.
pub(super) fn detach(mountpoint: &Path, force: bool) -> io::Result<()> {
    if force {
        // Breaks what is under way, and then says that it is busy.
        let _ = rustix::mount::unmount(mountpoint, UnmountFlags::FORCE);
    }
    let flags = if force { UnmountFlags::DETACH } else { UnmountFlags::empty() };
    match rustix::mount::unmount(mountpoint, flags) {
        Err(Errno::PERM) => {
            let options: &[&str] = if force { &["-u", "-z", "--"] } else { &["-u", "--"] };
            let output = Command::new(HELPER).args(options).arg(mountpoint).stdin(Stdio::null()).output()?;
            if output.status.success() {
                return Ok(());
            }
            Err(io::Error::other(String::from_utf8_lossy(&output.stderr).trim().to_owned()))
        }
        detached => Ok(detached?),
    }
}
