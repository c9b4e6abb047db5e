//! A future that there may not be.

/// What it comes to; never where there is none. As cancel safe as it is.
pub(crate) async fn or_never<F: Future>(future: Option<F>) -> F::Output {
    match future {
        Some(future) => future.await,
        None => std::future::pending().await,
    }
}
