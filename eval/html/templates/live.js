let tag = "", version = document.querySelector("main").cloneNode(true);
link(version, document.querySelector("main"));
const isMoving = () => ["running", "waiting"].includes(document.querySelector("main > header").dataset.state);

poll(async () => {
  const answer = await fetch("main", {headers: tag ? {"If-None-Match": tag} : {}});
  if (answer.status === 304) return;
  if (!answer.ok) throw new Error(parse(await answer.text()).textContent.trim());
  const fresh = version.cloneNode(false);
  fresh.append(parse(await answer.text()));
  update(version, fresh);
  [version, tag] = [fresh, answer.headers.get("ETag")];
  document.title = fresh.querySelector("header").dataset.title;
  showTimes();
}, () => isMoving() ? {{ refresh_seconds }} : 5 * {{ refresh_seconds }});
