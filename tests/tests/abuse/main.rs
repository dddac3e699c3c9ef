//! What strangers, neighbours, thieves and broken peers try on a real server, and what they get: nothing.

mod attackers;
mod cuts;
mod limits;
mod matrix;
mod oracle;
mod probes;
mod replay;
mod slow;
mod victim;
