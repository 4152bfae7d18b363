// oauth4webapi at work for a test: a verb and its arguments a line in, what it answered or threw a line out.
//
// `shown.mjs` is the program of the how-to. What a test says is in the verbs; what it keeps for later, such as keys, is
// named by it and stays here.

import { createInterface } from "node:readline";

import * as oauth from "oauth4webapi";

import * as shown from "./shown.mjs";

const LOOPBACK = { [oauth.allowInsecureRequests]: true };
const kept = new Map();
let server;

/** With the DPoP key of this name, which is made when it is named first. */
async function bound(client, name) {
  if (name === null) return LOOPBACK;
  if (!kept.has(name)) kept.set(name, oauth.DPoP(client, await oauth.generateKeyPair("ES256")));
  return { ...LOOPBACK, DPoP: kept.get(name) };
}

async function authenticated({ client_id, jwk, assertion }) {
  if (assertion) return [{ client_id }, shown.workloadToken(assertion)];
  const { alg, kid, ...members } = jwk;
  const algorithm = { name: "ECDSA", namedCurve: members.crv };
  const key = await crypto.subtle.importKey("jwk", members, algorithm, false, ["sign"]);
  return [{ client_id }, oauth.PrivateKeyJwt({ key, kid })];
}

const verbs = {
  async discover({ issuer, algorithm }) {
    server = await shown.discovered(issuer, { ...LOOPBACK, algorithm });
    return server;
  },
  async token({ by, parameters, dpop }) {
    const [client, auth] = await authenticated(by);
    return await shown.token(server, client, auth, parameters, await bound(client, dpop));
  },
  async renew({ by, token, dpop }) {
    const [client, auth] = await authenticated(by);
    return await shown.renewed(server, client, auth, token, await bound(client, dpop));
  },
  async collect({ by, code }) {
    return await shown.collected(server, ...(await authenticated(by)), code, LOOPBACK);
  },
  async introspect({ by, token }) {
    return await shown.introspected(server, ...(await authenticated(by)), token, LOOPBACK);
  },
  async revoke({ by, token }) {
    await shown.handedBack(server, ...(await authenticated(by)), token, LOOPBACK);
    return null;
  },
  /** What a resource server makes of the request that a client would send it. */
  async check({ token, audience, dpop, scheme, to }) {
    let request;
    const capture = { [oauth.customFetch]: async (url, init) => ((request = new Request(url, init)), new Response()) };
    const options = { ...(await bound({ client_id: "somebody" }, dpop)), ...capture };
    await oauth.protectedResourceRequest(token, "GET", new URL(`${audience}/contacts`), undefined, null, options);
    if (scheme !== null) request.headers.set("authorization", `${scheme} ${token}`);
    if (to !== null) request = new Request(to, { headers: request.headers });
    return await oauth.validateJwtAccessToken(server, request, audience, LOOPBACK);
  },
  async thumbprint({ dpop }) {
    return await kept.get(dpop).calculateThumbprint();
  },
  /** From the 401 of an API to who can be asked for its tokens (RFC 9728). */
  async challenged({ url }) {
    try {
      await oauth.protectedResourceRequest("no-token-of-ours", "GET", new URL(url), undefined, null, LOOPBACK);
    } catch (error) {
      const resource = new URL(url.replace(/\/v1\/.*$/, "/v1"));
      const answer = await oauth.resourceDiscoveryRequest(resource, LOOPBACK);
      return { challenges: error.cause, found: await oauth.processResourceDiscoveryResponse(resource, answer) };
    }
    throw new Error("it was let in");
  },
};

async function thrown(error) {
  const said = { name: error.name, message: error.message };
  for (const member of ["code", "error", "status", "error_description"]) said[member] = error[member] ?? null;
  if (error instanceof oauth.ResponseBodyError) said.body = error.cause;
  if (error instanceof oauth.WWWAuthenticateChallengeError) {
    said.challenges = error.cause;
    said.body = await error.response.json();
  }
  return said;
}

for await (const line of createInterface({ input: process.stdin })) {
  const { verb, ...asked } = JSON.parse(line);
  const answer = await verbs[verb](asked).then(
    (answered) => ({ answered }),
    async (error) => ({ thrown: await thrown(error) }),
  );
  console.log(JSON.stringify(answer));
}
