//! `strand mount`.

use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use crossbeam_channel::RecvTimeoutError;
use parking_lot::Mutex;
use serde::Serialize;
use strandline_messages::SnapshotId;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{Notify, mpsc, oneshot};

use super::Fate;
use super::args::{Global, bytes};
use super::output;
use super::repository::{Connected, Location, Opened};
use super::selector::{self, Snapshot};
use super::session::{Reading, STREAMS};
use super::settings::Place;
use crate::mount::{CACHE_BYTES_MIN, MountSettings, Mounted, Repository, Shown, Unmounter};
use crate::trees::{ChunkSource, FetchError};

/// Requests of the mount's threads that wait for the connection's thread. More are refused: only one asks for the list.
const REQUESTS_MAX: usize = 16;
/// How long whoever looks into a directory waits for a new list of snapshots.
const LIST_WAIT: Duration = Duration::from_secs(10);
/// How long the connection's thread waits for it.
const LIST_MAX: Duration = Duration::from_mins(1);
/// Between two attempts to open a lost session again.
const REOPEN_WAIT: Duration = Duration::from_secs(10);
/// How long closing in good order may take.
const CLOSE_MAX: Duration = Duration::from_secs(10);

/// `strand mount`.
#[derive(Args, Debug)]
pub struct Mount {
    /// An existing directory
    pub mountpoint: PathBuf,
    /// Only snapshots of this host; may be repeated
    #[arg(long, value_name = "HOST")]
    pub host: Vec<String>,
    /// Only snapshots with this tag; repeated: with all of them
    #[arg(long, value_name = "TAG")]
    pub tag: Vec<String>,
    /// Let other users look, too; the kernel checks permissions
    #[arg(long)]
    pub allow_other: bool,
    /// With --allow-other: let everybody read everything, whatever the permissions say
    #[arg(long)]
    pub no_default_permissions: bool,
    /// File content kept in memory (at least 8M)
    #[arg(long, value_name = "SIZE", default_value = "128M", value_parser = cache_size)]
    pub cache_size: u64,
    /// Parallel data streams, 1 to 64; the server may allow fewer
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    pub streams: Option<u16>,
}

fn cache_size(text: &str) -> Result<u64, String> {
    let size = bytes(text)?;
    if size < CACHE_BYTES_MIN { Err("it must be at least 8M".to_owned()) } else { Ok(size) }
}

impl Mount {
    fn shows(&self, snapshot: &Snapshot) -> bool {
        (self.host.is_empty() || self.host.contains(&snapshot.manifest.host))
            && self.tag.iter().all(|tag| snapshot.tags.contains(tag))
    }

    fn shown(&self, snapshots: Vec<Snapshot>) -> Vec<Shown> {
        let shown = snapshots.into_iter().filter(|snapshot| self.shows(snapshot)).map(|snapshot| Shown {
            id: snapshot.id,
            order: snapshot.order,
            root: snapshot.manifest.root,
            started_ns: snapshot.manifest.started_ns,
            host: snapshot.manifest.host,
            tags: snapshot.tags,
        });
        shown.collect()
    }
}

/// A request for the list of snapshots: where the answer goes.
type Request = crossbeam_channel::Sender<Result<Vec<Shown>, String>>;

/// The repository as the mount's threads see it.
struct Remote {
    requests: mpsc::Sender<Request>,
    lost: Arc<Notify>,
    /// None once the session is being closed.
    reading: Arc<Mutex<Option<Reading>>>,
}

impl Repository for Remote {
    fn snapshots(&self) -> Result<Vec<Shown>, String> {
        let (reply, answer) = crossbeam_channel::bounded(1);
        self.requests.try_send(reply).map_err(|_| "the connection is busy or closed".to_owned())?;
        answer.recv_timeout(LIST_WAIT).unwrap_or_else(|error| match error {
            RecvTimeoutError::Timeout => Err("the server does not answer".to_owned()),
            RecvTimeoutError::Disconnected => Err("the connection is closed".to_owned()),
        })
    }

    fn source(&self, snapshot: SnapshotId) -> Result<Arc<dyn ChunkSource>, FetchError> {
        let reading = self.reading.lock();
        let lost = || FetchError::Lost { reason: "the session is closed".to_owned() };
        reading.as_ref().map(|reading| reading.source(snapshot)).ok_or_else(lost)
    }

    fn lost(&self) {
        self.lost.notify_one();
    }
}

/// The connection, on the thread of its actors.
struct Line<'a> {
    global: &'a Global,
    place: &'a Place,
    wanted: &'a Mount,
    opened: Opened,
    reading: Arc<Mutex<Option<Reading>>>,
    streams: u16,
}

impl Line<'_> {
    /// Never ends: it is dropped with the mount.
    async fn serve(&mut self, mut requests: mpsc::Receiver<Request>, lost: &Notify) {
        loop {
            tokio::select! {
                Some(reply) = requests.recv() => {
                    let list = self.list().await;
                    let broken = list.is_err();
                    // Whoever asked may have stopped waiting.
                    let _ = reply.try_send(list);
                    if broken {
                        self.see_to_it().await;
                    }
                }
                () = lost.notified() => self.see_to_it().await,
            }
        }
    }

    async fn list(&self) -> Result<Vec<Shown>, String> {
        match tokio::time::timeout(LIST_MAX, selector::all(&self.opened)).await {
            Ok(Ok(list)) => Ok(self.wanted.shown(list)),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err("the server does not answer".to_owned()),
        }
    }

    /// Opens everything again if the connection has given up: after a very long outage, or when the session has expired.
    /// A connection that is still trying is left alone.
    async fn see_to_it(&mut self) {
        let asked = tokio::time::timeout(LIST_WAIT, self.opened.server.client.status()).await;
        if !matches!(asked, Ok(Err(_))) || self.opened.server.directory.is_some() {
            return;
        }
        match self.reopen().await {
            Ok(()) => tracing::warn!("the session was lost; another one carries on for it"),
            Err(error) => {
                tracing::warn!(%error, "the session is lost and cannot be opened again yet");
                tokio::time::sleep(REOPEN_WAIT).await;
            }
        }
    }

    async fn reopen(&mut self) -> anyhow::Result<()> {
        let location = Location::find(self.global, self.place)?;
        let server = Connected::open(&location, false, self.global, self.place).await?;
        let (info, keyset) = (self.opened.info.clone(), Arc::clone(&self.opened.keyset));
        let opened = Opened { server, info, keyset, slot: self.opened.slot };
        let reading = match Reading::open(&opened, self.streams).await {
            Ok(reading) => reading,
            Err(error) => {
                // The first error is the one to report.
                let _ = opened.server.close().await;
                return Err(error);
            }
        };
        let old = std::mem::replace(&mut self.opened, opened);
        let old_reading = self.reading.lock().replace(reading);
        close(old, old_reading, "the session was replaced").await
    }
}

/// Closes in good order, but not for ever: a server that is gone lets the session expire.
async fn close(opened: Opened, reading: Option<Reading>, reason: &str) -> anyhow::Result<()> {
    if let Some(reading) = reading {
        let _ = tokio::time::timeout(CLOSE_MAX, reading.close(&opened, reason)).await;
    }
    match tokio::time::timeout(CLOSE_MAX, opened.server.close()).await {
        Ok(closed) => closed,
        Err(_) => Ok(()),
    }
}

/// Runs the command.
pub async fn run(global: &Global, place: &Place, wanted: &Mount) -> anyhow::Result<Fate> {
    let mut ends = Ends::new()?;
    let opened = Opened::existing(global, place).await?;
    let streams = wanted.streams.or(place.settings.streams).unwrap_or(STREAMS);
    let first =
        async { Ok::<_, anyhow::Error>((selector::all(&opened).await?, Reading::open(&opened, streams).await?)) };
    let (snapshots, reading) = match first.await {
        Ok(first) => first,
        Err(error) => {
            // The first error is the one to report.
            let _ = opened.server.close().await;
            return Err(error);
        }
    };
    let reading = Arc::new(Mutex::new(Some(reading)));
    let mut line = Line { global, place, wanted, opened, reading: Arc::clone(&reading), streams };
    let mounted = mount(global, &mut line, wanted.shown(snapshots), &mut ends).await;
    let reading = reading.lock().take();
    let closed = close(line.opened, reading, "").await;
    mounted?;
    closed.map(|()| Fate::Done)
}

async fn mount(global: &Global, line: &mut Line<'_>, first: Vec<Shown>, ends: &mut Ends) -> anyhow::Result<()> {
    let (requests, received) = mpsc::channel(REQUESTS_MAX);
    let lost = Arc::new(Notify::new());
    let remote = Arc::new(Remote { requests, lost: Arc::clone(&lost), reading: Arc::clone(&line.reading) });
    let settings = MountSettings {
        mountpoint: line.wanted.mountpoint.clone(),
        allow_other: line.wanted.allow_other,
        // As restic has it: whoever mounts for himself may read everything.
        permissions: line.wanted.allow_other && !line.wanted.no_default_permissions,
        cache_bytes: line.wanted.cache_size,
    };
    let shown = first.len();
    let mounted = Mounted::start(remote, first, &settings)?;
    let unmounter = mounted.unmounter();
    let mountpoint = mounted.mountpoint().to_owned();
    let (end, ended) = oneshot::channel();
    let serving = std::thread::spawn(move || {
        // Whoever waits is in this process.
        let _ = end.send(mounted.serve());
    });
    tell_ready(global, &mountpoint, shown);
    let served = tokio::select! {
        served = ends.wait(ended, unmounter) => served,
        () = line.serve(received, &lost) => Ok(()),
    };
    // It has nothing left to do but to end.
    let _ = serving.join();
    served
}

#[derive(Serialize)]
struct Ready<'a> {
    message_type: &'static str,
    mountpoint: &'a str,
    snapshots: usize,
}

/// The line that scripts wait for. Nobody needs to read it: a mount is of use without.
fn tell_ready(global: &Global, mountpoint: &Path, snapshots: usize) {
    let shown = output::path(mountpoint.as_os_str().as_bytes());
    let line = if global.json {
        let ready = Ready { message_type: "mounted", mountpoint: &shown, snapshots };
        serde_json::to_string(&ready).unwrap_or_default()
    } else {
        format!("mounted {snapshots} snapshots on {shown}; end with Ctrl-C or `umount`")
    };
    if global.json || !global.quiet {
        let _ = writeln!(std::io::stdout(), "{line}");
    }
}

/// The signals that end a mount.
struct Ends {
    signals: [Signal; 3],
}

impl Ends {
    fn new() -> std::io::Result<Self> {
        let kinds = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()];
        let [interrupt, terminate, hangup] = kinds.map(signal);
        Ok(Self { signals: [interrupt?, terminate?, hangup?] })
    }

    async fn next(&mut self) {
        let [interrupt, terminate, hangup] = &mut self.signals;
        tokio::select! { _ = interrupt.recv() => {}, _ = terminate.recv() => {}, _ = hangup.recv() => {} }
    }

    /// Until the file system is unmounted, by whom ever. The first signal unmounts, unless it is in use; the second one
    /// unmounts in any case.
    async fn wait(
        &mut self,
        mut ended: oneshot::Receiver<std::io::Result<()>>,
        unmounter: Unmounter,
    ) -> anyhow::Result<()> {
        let mut asked = false;
        loop {
            tokio::select! {
                served = &mut ended => {
                    return match served {
                        Ok(served) => Ok(served?),
                        Err(_) => anyhow::bail!("the threads of the mount ended early; unmount it and mount it again"),
                    };
                }
                () = self.next() => {}
            }
            if asked {
                unmounter.force();
            } else if let Err(error) = unmounter.unmount() {
                let busy = "it ends when nobody uses it any more and it is unmounted; a second signal ends it now";
                output::error(false, Fate::Done.code(), &format!("the mount is in use ({error}): {busy}"));
            }
            asked = true;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cache_too_small_to_read_ahead_is_refused() {
        assert!(cache_size("1M").is_err());
        assert_eq!(cache_size("8M"), Ok(8 << 20));
    }
}
