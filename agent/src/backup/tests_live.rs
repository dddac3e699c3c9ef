//! Sources that change while they are saved (scenario 38), and changes that timestamps hide (scenario 54).

use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{MetadataExt, symlink};
use std::process::{Command, Stdio};

use rustix::fs::{AtFlags, CWD, Timestamps};
use strandline_messages::format::tree::EntryNode;

use super::CacheTrust;
use super::memory_server::{Rig, Run, noise};

const BIG: usize = 48 << 20;

// One reader, and a change while the first big file is being read.
fn run_with_change(rig: &mut Rig, change: impl FnOnce() + Send + 'static) -> Run {
    rig.plan.readers = 1;
    rig.plan.scanners = 0;
    rig.server.0.lock().on_first_query = Some(Box::new(change));
    rig.run(CacheTrust::Trust)
}

fn message<'r>(run: &'r Run, name: &str) -> &'r str {
    let found = run.errors.iter().find(|error| error.path.ends_with(name.as_bytes()));
    found.map_or_else(|| panic!("{name} is not reported: {:?}", run.errors), |error| error.message.as_str())
}

#[test]
fn s38_a_file_that_shrinks_while_it_is_read_is_saved_as_read_and_reported() {
    let mut rig = Rig::new();
    rig.write("a", &noise(1, BIG));
    rig.write("b", b"other");
    let path = rig.path("a");
    let run = run_with_change(&mut rig, move || {
        std::fs::OpenOptions::new().write(true).open(path).unwrap().set_len(1000).unwrap();
    });
    assert!(message(&run, "/a").contains("changed while"));
    let bytes = run.at(&rig.path("a")).bytes.as_ref().unwrap();
    assert!(bytes.len() < BIG && noise(1, BIG).starts_with(bytes));
    assert_eq!(run.at(&rig.path("b")).bytes.as_deref(), Some(&b"other"[..]));
    let again = rig.run(CacheTrust::Trust);
    assert_eq!(again.now.files_opened, 1, "it is not in the cache");
    again.assert_equals(rig.source.path());
}

#[test]
fn s38_a_file_that_grows_while_it_is_read_is_saved_as_read_and_reported() {
    let mut rig = Rig::new();
    rig.write("a", &noise(1, BIG));
    let path = rig.path("a");
    let run = run_with_change(&mut rig, move || {
        std::fs::OpenOptions::new().append(true).open(path).unwrap().write_all(b"more").unwrap();
    });
    assert!(message(&run, "/a").contains("changed while"));
    assert_eq!(run.at(&rig.path("a")).bytes.as_ref().unwrap().len(), BIG);
    rig.run(CacheTrust::Trust).assert_equals(rig.source.path());
}

#[test]
fn s38_what_vanishes_or_is_replaced_before_it_is_read_is_reported_and_the_rest_is_saved() {
    let mut rig = Rig::new();
    rig.write("a", &noise(1, BIG));
    for i in 0..30 {
        rig.write(&format!("b{i:02}"), &noise(i, 600 << 10));
    }
    for name in ["c-gone", "d-link", "e-fifo", "y-dir/inside", "z-dir/inside", "zz"] {
        rig.write(name, &noise(3, 5000));
    }
    let source = rig.source.path().to_owned();
    let run = run_with_change(&mut rig, move || {
        let at = |name: &str| source.join(name);
        for name in ["c-gone", "d-link", "e-fifo"] {
            std::fs::remove_file(at(name)).unwrap();
        }
        symlink("/etc/passwd", at("d-link")).unwrap();
        rustix::fs::mknodat(CWD, at("e-fifo"), rustix::fs::FileType::Fifo, rustix::fs::Mode::RWXU, 0).unwrap();
        std::fs::remove_dir_all(at("y-dir")).unwrap();
        std::fs::rename(at("z-dir"), at("z-moved")).unwrap();
        symlink("/etc", at("z-dir")).unwrap();
    });
    for name in ["/c-gone", "/y-dir"] {
        assert!(message(&run, name).contains("vanished"), "{name}: {}", message(&run, name));
    }
    for name in ["/d-link", "/e-fifo", "/z-dir"] {
        assert!(message(&run, name).contains("replaced"), "{name}: {}", message(&run, name));
    }
    assert!(!run.has(&rig.path("z-dir/passwd")) && !run.has(&rig.path("c-gone")));
    assert_eq!(run.at(&rig.path("zz")).bytes.as_deref(), Some(noise(3, 5000).as_slice()));
    assert_eq!(run.outcome.totals.errors, 5);
    rig.run(CacheTrust::Trust).assert_equals(rig.source.path());
}

#[test]
fn s38_what_cannot_be_read_is_reported_and_the_rest_is_saved() {
    // Not even root may read a write-only attribute of the kernel.
    let buses = std::fs::read_dir("/sys/bus").into_iter().flatten().flatten();
    let Some(unreadable) = buses.map(|bus| bus.path().join("drivers_probe")).find(|path| path.exists()) else {
        println!("no write-only file of the kernel here: not covered");
        return;
    };
    let mut rig = Rig::new();
    rig.write("a", b"a");
    rig.plan.paths.push(unreadable.clone());
    let run = rig.run(CacheTrust::Trust);
    assert!(message(&run, "drivers_probe").contains("could not be opened"));
    assert!(!run.has(&unreadable) && run.has(&rig.path("a")));
}

#[test]
fn s54_a_file_changed_within_the_granularity_of_its_timestamps_is_read_again() {
    let mut rig = Rig::new();
    rig.clock_ahead_seconds = None;
    rig.write("a", &noise(1, 3000));
    rig.run(CacheTrust::Trust);
    assert_eq!(rig.run(CacheTrust::Trust).now.files_opened, 1, "it had not settled when it was read");
    rig.clock_ahead_seconds = Some(10);
    rig.run(CacheTrust::Trust);
    assert_eq!(rig.run(CacheTrust::Trust).now.files_opened, 0);
}

#[test]
fn s54_a_file_whose_size_and_mtime_were_put_back_is_read_again() {
    let rig = Rig::new();
    rig.write("a", &noise(1, 3000));
    let meta = std::fs::metadata(rig.path("a")).unwrap();
    rig.run(CacheTrust::Trust);
    rig.write("a", &noise(2, 3000));
    let time = rustix::fs::Timespec { tv_sec: meta.mtime(), tv_nsec: meta.mtime_nsec() };
    let times = Timestamps { last_access: time, last_modification: time };
    rustix::fs::utimensat(CWD, rig.path("a"), &times, AtFlags::empty()).unwrap();
    let run = rig.run(CacheTrust::Trust);
    assert_eq!(run.now.files_opened, 1);
    run.assert_equals(rig.source.path());
}

#[test]
fn s54_with_the_clock_set_back_nothing_from_the_future_counts() {
    let mut rig = Rig::new();
    rig.write("a", &noise(1, 3000));
    rig.clock_ahead_seconds = Some(-100_000);
    rig.run(CacheTrust::Trust);
    assert_eq!(rig.run(CacheTrust::Trust).now.files_opened, 1);
}

#[test]
fn s54_a_store_into_a_mapped_page_after_the_file_was_read_is_seen_by_the_next_run() {
    let mut rig = Rig::new();
    rig.plan.flush_sources = true;
    rig.write("mapped", &noise(1, 8192));
    // Maps the file, dirties its page, and stores into the same page once more at every line of input.
    let program = "import mmap,sys\nf=open(sys.argv[1],'r+b')\nm=mmap.mmap(f.fileno(),0)\nn=0\nm[0]=n\nprint('ready',flush=True)\nfor line in sys.stdin:\n n+=1\n m[0]=n\n print('stored',flush=True)\n";
    let child = Command::new("python3")
        .args(["-c", program])
        .arg(rig.path("mapped"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn();
    let Ok(mut child) = child else {
        println!("no python3 here: not covered");
        return;
    };
    let mut input = child.stdin.take().unwrap();
    let mut output = BufReader::new(child.stdout.take().unwrap()).lines();
    assert_eq!(output.next().unwrap().unwrap(), "ready");
    let first = rig.run(CacheTrust::Trust);
    assert_eq!(first.at(&rig.path("mapped")).bytes.as_ref().unwrap()[0], 0);
    input.write_all(b"store\n").unwrap();
    assert_eq!(output.next().unwrap().unwrap(), "stored");
    let second = rig.run(CacheTrust::Trust);
    assert_eq!(second.at(&rig.path("mapped")).bytes.as_ref().unwrap()[0], 1, "the store was missed");
    assert!(matches!(second.at(&rig.path("mapped")).entry.node, EntryNode::File { .. }));
    drop(input);
    child.wait().unwrap();
}
