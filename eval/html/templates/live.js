let tag = "";
async function refresh() {
  try {
    const answer = await fetch("/main", {headers: tag ? {"If-None-Match": tag} : {}});
    if (answer.status === 200) {
      tag = answer.headers.get("ETag");
      document.querySelector("main").innerHTML = await answer.text();
    }
    document.body.dataset.state = "live";
  } catch (error) { document.body.dataset.state = "stopped"; }
  setTimeout(refresh, {{ refresh_milliseconds }});
}
refresh();
