//! Health over HTTP, with flannel's paths, bodies and codes: `/healthz` says that the daemon runs,
//! `/readyz` whether it forwards and all that belongs to it is in place.

use std::net::SocketAddr;

use anyhow::Context;
use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::get;
use tokio::net::TcpListener;
use tokio::sync::watch;

use crate::health::Phase;

/// Answers from now on, until the runtime ends.
///
/// # Errors
/// The address cannot be listened at.
pub(crate) async fn serve(
    address: SocketAddr,
    phases: watch::Receiver<Phase>,
) -> anyhow::Result<()> {
    let listener = TcpListener::bind(address).await.with_context(|| {
        format!("cannot listen at {address}; change --healthz-port or --healthz-ip")
    })?;
    tracing::info!(%address, "answering health checks");
    let router = Router::new()
        .route("/healthz", get("flanneld is running"))
        .route("/readyz", get(ready))
        .with_state(phases);
    tokio::spawn(async move {
        if let Err(error) = axum::serve(listener, router).await {
            tracing::error!("health checks are answered no more: {error}");
        }
    });
    Ok(())
}

async fn ready(State(phases): State<watch::Receiver<Phase>>) -> (StatusCode, &'static str) {
    match &*phases.borrow() {
        Phase::Forwarding { problems, .. } if problems.is_empty() => {
            (StatusCode::OK, "flanneld is ready")
        }
        Phase::Forwarding { .. } | Phase::Starting(_) => {
            (StatusCode::SERVICE_UNAVAILABLE, "flanneld is not ready yet")
        }
    }
}
