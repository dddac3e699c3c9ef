//! File systems of a test's own: small ones in memory that fill up, and ones in a file whose power can be cut. Unmounted when
//! dropped.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::rig::not_run;

/// Inodes of a small disk: enough for any test that does not use them up, and few to use up.
const INODES: u32 = 2_000;

/// A file system in memory with limits.
#[derive(Debug)]
pub struct SmallDisk(PathBuf);

impl SmallDisk {
    /// Of `mib` MiB, at `at`. `None`, with a line that says so, where mounting is not possible.
    pub fn mount(at: &Path, mib: u32) -> Result<Option<Self>> {
        fs::create_dir_all(at)?;
        let status = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={mib}m,nr_inodes={INODES}"), "small"])
            .arg(at)
            .output();
        if status.as_ref().is_ok_and(|output| output.status.success()) {
            return Ok(Some(Self(at.to_owned())));
        }
        not_run(&format!("a small file system cannot be mounted here ({status:?})"));
        Ok(None)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Gives it `mib` MiB.
    pub fn resize(&self, mib: u32) -> Result<()> {
        self.remount(&format!("size={mib}m"))
    }

    /// Mounts it again with other options.
    pub fn remount(&self, options: &str) -> Result<()> {
        succeed(Command::new("mount").args(["-o", &format!("remount,{options}")]).arg(&self.0))
    }

    /// Takes every free inode but `spare`, with empty files in a directory that is returned: removing it gives them back.
    pub fn take_inodes(&self, spare: u64) -> Result<PathBuf> {
        let directory = self.0.join("taken");
        fs::create_dir_all(&directory)?;
        for n in 0_u64.. {
            if rustix::fs::statvfs(&self.0)?.f_ffree <= spare {
                break;
            }
            File::create(directory.join(n.to_string()))?;
        }
        Ok(directory)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

/// Which file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// ext4 with its defaults.
    Ext4,
    /// XFS with its defaults.
    Xfs,
}

impl Kind {
    /// Its name for mount and mkfs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
        }
    }
}

/// A file system on a loop device whose power can be cut: what was not made durable is gone afterwards.
///
/// The cut is the shutdown ioctl without a flush of the journal. From then on nothing more gets to the device; what had got
/// there stays, as on a disk without a volatile cache.
#[derive(Debug)]
pub struct PowerDisk {
    at: PathBuf,
    image: PathBuf,
    kind: Kind,
}

/// XFS_IOC_GOINGDOWN, which is EXT4_IOC_SHUTDOWN, too, with the flag that says: no flush of the log.
const CUT: &str = "open(F, '<', $ARGV[0]) or die \"open: $!\"; my $flag = pack('L', 2); \
                   defined ioctl(F, 0x8004587d, $flag) or die \"ioctl: $!\"";

impl PowerDisk {
    /// A new one, its image in `scratch` and mounted there. `None`, with a line that says so, where that is not possible.
    pub fn make(scratch: &Path, kind: Kind) -> Result<Option<Self>> {
        let (image, at) = (scratch.join("image"), scratch.join("disk"));
        // The smallest that mkfs.xfs makes is 300 MiB; the file is sparse.
        File::create(&image)?.set_len(512 << 20)?;
        fs::create_dir_all(&at)?;
        let made = Command::new(format!("mkfs.{}", kind.name())).arg("-q").arg(&image).output();
        if !made.as_ref().is_ok_and(|output| output.status.success()) {
            not_run(&format!("no {} file system can be made here ({made:?})", kind.name()));
            return Ok(None);
        }
        let disk = Self { at, image, kind };
        if let Err(error) = disk.mount() {
            not_run(&format!("no {} file system can be mounted on a loop device here ({error:#})", kind.name()));
            return Ok(None);
        }
        if let Err(error) = disk.cut().and_then(|()| disk.restore_power()) {
            not_run(&format!("the power of an {} file system cannot be cut here ({error:#})", kind.name()));
            return Ok(None);
        }
        Ok(Some(disk))
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        &self.at
    }

    /// From now on every write and sync fails.
    pub fn cut(&self) -> Result<()> {
        succeed(Command::new("perl").args(["-e", CUT]).arg(&self.at))
    }

    /// Unmounts it, which nobody may hold open any more, and mounts what the device has.
    pub fn restore_power(&self) -> Result<()> {
        succeed(Command::new("umount").arg(&self.at))?;
        self.mount()
    }

    fn mount(&self) -> Result<()> {
        succeed(Command::new("mount").args(["-t", self.kind.name(), "-o", "loop"]).arg(&self.image).arg(&self.at))
    }
}

impl Drop for PowerDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.at).output();
    }
}

fn succeed(command: &mut Command) -> Result<()> {
    let output = command.output().with_context(|| format!("cannot run {command:?}"))?;
    ensure!(
        output.status.success(),
        "{command:?} ended with {}: {}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}
