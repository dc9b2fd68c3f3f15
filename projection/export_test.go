package projection

// Isolated reports whether projections share decoded values of the type.
var Isolated = isolated
