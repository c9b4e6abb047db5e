//! Whether this node forwards, for whoever asks: the service manager ([`crate::notify`]) and health
//! checks ([`crate::http`]).

use tokio::sync::watch;

/// How far the daemon has come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Phase {
    /// It waits for something, and does not forward yet.
    Starting(String),
    /// It forwards.
    Forwarding {
        /// What is missing of what belongs to it: the node is not ready for all.
        problems: Vec<String>,
        /// What else somebody should see to.
        notes: Vec<String>,
    },
}

/// The one place that knows.
#[derive(Debug, Clone)]
pub(crate) struct Health(watch::Sender<Phase>);

impl Health {
    pub(crate) fn new() -> Self {
        Self(watch::Sender::new(Phase::Starting("starting".into())))
    }

    /// Says what the daemon waits for, unless it forwards meanwhile.
    pub(crate) fn waits(&self, what: &str) {
        self.0.send_if_modified(|phase| match phase {
            Phase::Starting(known) if known != what => {
                what.clone_into(known);
                true
            }
            Phase::Starting(_) | Phase::Forwarding { .. } => false,
        });
    }

    /// Says that forwarding is over, and why.
    pub(crate) fn starts_again(&self, why: &str) {
        self.0.send_replace(Phase::Starting(why.into()));
    }

    /// Says that the daemon forwards.
    pub(crate) fn forwards(&self, problems: Vec<String>, notes: Vec<String>) {
        let next = Phase::Forwarding { problems, notes };
        self.0.send_if_modified(|phase| {
            let changed = *phase != next;
            *phase = next;
            changed
        });
    }

    pub(crate) fn watch(&self) -> watch::Receiver<Phase> {
        self.0.subscribe()
    }
}
