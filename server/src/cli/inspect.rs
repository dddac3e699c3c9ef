//! `inspect`: arguments, and what is shown.

use std::io::Write;

use clap::Args;

use super::output::print_json;
use super::{EXIT_DONE, EXIT_FAILED};
use crate::inspect::{Field, Kind, Problem, split_offset};

#[derive(Debug, Args)]
pub(super) struct InspectArguments {
    /// What the file is.
    kind: Kind,
    /// The file; with @OFFSET what lies there, such as a block of a pack.
    #[arg(value_name = "FILE[@OFFSET]")]
    file: String,
}

/// Shows what is in a file; failed if something is wrong with it.
pub(super) fn inspect(out: &mut dyn Write, json: bool, arguments: &InspectArguments) -> anyhow::Result<u8> {
    let (path, offset) = split_offset(&arguments.file);
    let found = crate::inspect::inspect(arguments.kind, &path, offset)?;
    if json {
        let mut object = serde_json::to_value(&found)?;
        if let Some(object) = object.as_object_mut() {
            object.insert("message_type".to_owned(), "inspected".into());
            object.insert("file".to_owned(), path.display().to_string().into());
        }
        print_json(out, &object)?;
    } else {
        writeln!(out, "{:>10} {:>10}  {}", "OFFSET", "BYTES", found.kind)?;
        for Field { offset, bytes, name, value } in &found.fields {
            writeln!(out, "{offset:>10} {bytes:>10}  {name}: {value}")?;
        }
        for Problem { offset, what } in &found.problems {
            writeln!(out, "WRONG at offset {offset}: {what}")?;
        }
    }
    Ok(if found.problems.is_empty() { EXIT_DONE } else { EXIT_FAILED })
}
